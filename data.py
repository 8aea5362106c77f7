"""From annotation files and video files to batches of frames and tokens ("Experimental Settings": data sets, 12 frames a clip, 224 px).

    python data.py check --dataset msrvtt        # what is there, what is missing, whether training can start
    python data.py cache --dataset msrvtt        # decode every clip once, before training

One record a clip (`Clip`), one reader a data set (`READERS`), exact frames through ffmpeg (`decode_frames`), CLIP's preprocessing
(`resize`, `center_crop`, `normalise`), a cache of decoded frames (`FrameCache`), and a loader whose batches depend on nothing but the
seed and the epoch (`epoch_batches`, `ClipDataset`). Anything wrong with the input is a DataError, one sentence that says what to do.
"""

import csv
import functools
import hashlib
import io
import json
import os
import pickle
import re
import socket
import sys
import urllib.parse
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import ffmpeg
import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

import shapes

T, R = TypeVar("T"), TypeVar("R")


class DataError(ValueError):
    """The user's data cannot be used as it is. The message is one sentence: what is wrong, in which file, what to do."""


# ---------------------------------------------------------------------------------------------------------------- records, readers


@dataclass(frozen=True)
class Clip:
    """One video clip with every caption it has: the record that all readers make."""

    id: str
    path: Path
    captions: tuple[str, ...] = field(repr=False)
    split: str
    start: float = 0.0  # seconds into the file
    end: float | None = None  # None: to the file's end


VIDEO_SUFFIXES = {".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".3gp", ".3g2", ".mts", ".m2ts", ".flv", ".ogv", ".gif"}
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def stem(name: str) -> str:
    """A file name without its ending, where that is one of a video or picture. Dots that belong to a name stay, but for a last one."""
    base, dot, suffix = name.rpartition(".")
    return (base if dot and f".{suffix.lower()}" in VIDEO_SUFFIXES | PICTURE_SUFFIXES else name).rstrip(".")


def files_below(root: Path) -> Iterator[Path]:
    """Every file below a folder, in the order of their names; folders that are links are followed, each folder once."""
    seen = {os.path.realpath(root)}  # links may lead to one another
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if (real := os.path.realpath(Path(folder, name))) not in seen and not seen.add(real))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("._"))  # macOS archives hold a shadow of each file


class Files:
    """The files of a data set, found by name wherever they lie below its folder(s).

    So an unpacked archive needs no moving about, and a video is found under another ending than its annotation says (or none at all)."""

    def __init__(self, annotations: Path, videos: Path | None = None, needs: str = ""):
        self.annotations, self.videos, self.needs = annotations, videos or annotations, needs
        self._lists = self._below(annotations)
        self._videos = self._lists if videos is None else self._below(videos)
        self._stems: dict[str, list[Path]] = {}
        for paths in self._videos.values():
            self._stems.setdefault(stem(paths[0].name), []).extend(paths)

    def _below(self, root: Path) -> dict[str, list[Path]]:
        if not root.is_dir():
            raise DataError(f"{root} is not a folder: {self.needs}")
        found: dict[str, list[Path]] = {}
        for path in files_below(root):
            found.setdefault(path.name, []).append(path)
        return found

    def has(self, name: str) -> bool:
        """Whether there is an annotation file of that name."""
        return name in self._lists

    def annotation(self, name: str) -> Path:
        """The annotation file of that name. Raises DataError that says what the data set needs."""
        if name not in self._lists:
            raise DataError(f"{name} not found below {self.annotations}: {self.needs}")
        return self._lists[name][0]

    def lines(self, name: str) -> list[str]:
        """The lines of a text file, without line ends (LF or CRLF); empty ones are left out."""
        return _lines(self.annotation(name))

    def rows(self, name: str, *columns: str) -> list[dict[str, str]]:
        """The rows of a CSV file with a header; every value stays a string. Raises DataError when a column is missing."""
        return _csv_rows(self.annotation(name), *columns)

    def json(self, name: str):
        """What a JSON file holds. Raises DataError."""
        path = self.annotation(name)
        try:
            return json.loads(_text(path))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is no whole JSON file ({error}): download it again.") from None

    def video(self, name: str) -> Path:
        """Where the video of that name is: as it is written, else by its name alone, else under another ending; or where it should be."""
        exact = self.videos / name
        if exact.is_file():
            return exact
        found = self._videos.get(Path(name).name) or self._stems.get(stem(Path(name).name)) or [exact]
        if len(found) > 1:
            raise DataError(f"{name} can be {found[0]} or {found[1]}: keep one of them, or write it as it lies below {self.videos}.")
        return found[0]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read as UTF-8 ({error}): save it as UTF-8.") from None


def _lines(path: Path) -> list[str]:
    return [line.rstrip("\r") for line in _text(path).split("\n") if line.strip()]  # splitlines would also split at rarer characters


def _csv_rows(path: Path, *columns: str) -> list[dict[str, str]]:
    try:
        rows = list(csv.DictReader(io.StringIO(_text(path), newline="")))
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV ({error}): save it comma separated.") from None
    header = [str(name) for name in rows[0]] if rows else []
    if not {*columns} <= {*header}:
        raise DataError(
            f"{path} needs the columns {','.join(columns)} in its first line, and at least one row; found: {', '.join(header) or 'nothing'}."
        )
    return rows


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Captions by clip id, in the order of the file; an id that comes again keeps every caption."""
    captions: dict[str, list[str]] = {}
    for name, caption in pairs:
        captions.setdefault(name, []).append(caption)
    return captions


def cut(names: Iterable[str], count: int) -> set[str]:
    """`count` of the names, drawn by a hash of each: the same on every machine, and nearly the same when names are added."""
    return set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])


def _validation(train: Sequence[str]) -> set[str]:
    """The training clips that validate where a data set has no validation split: a tenth, at most 1,000."""
    return cut(train, min(1000, max(1, len(train) // 10)))


def read_msrvtt(files: Files, train: str = "9k") -> Iterator[Clip]:
    """MSR-VTT. train "9k", "7k": these training lists, the 1k-A test (one caption a clip); "full": the official split, 20 captions a clip.

    Validation: the 497 official clips, taken out of the training list (which holds them); without official splits in the JSON, a cut."""
    content = files.json("MSRVTT_data.json")
    captions = _grouped((sentence["video_id"], sentence["caption"]) for sentence in content["sentences"])
    official = {video["video_id"]: video.get("split", "").replace("validate", "val") for video in content.get("videos", [])}
    if train == "full":
        splits = {name: official.get(name, "") for name in captions}
    else:
        names = [row["video_id"] for row in files.rows(f"MSRVTT_train.{train}.csv", "video_id")]
        held_out = {name for name in names if official.get(name) == "val"} or _validation(names)
        test = {row["video_id"]: [row["sentence"]] for row in files.rows("MSRVTT_JSFUSION_test.csv", "video_id", "sentence")}
        splits = {name: "val" if name in held_out else "train" for name in names} | dict.fromkeys(test, "test")
        captions |= test
    for name, split in splits.items():
        yield Clip(name, files.video(f"{name}.mp4"), tuple(captions.get(name, ())), split)


def read_lsmdc(files: Files) -> Iterator[Clip]:
    """LSMDC. Tab separated whatever the files' ending says, no header, no CSV quoting; a clip on several lines keeps every sentence."""
    for split, name in {
        "train": "LSMDC16_annos_training.csv",
        "val": "LSMDC16_annos_val.csv",
        "test": "LSMDC16_challenge_1000_publictect.csv",
    }.items():
        sentences = []
        for number, line in enumerate(files.lines(name), start=1):
            if line.startswith('"'):  # a whole line was quoted somewhere on its way
                line = line[1:].removesuffix('"').replace('""', '"')
            fields = line.split("\t")
            if len(fields) not in (6, 7):  # the seventh is the paraphrase of a variant
                raise DataError(
                    f"{files.annotation(name)}, line {number}: {len(fields)} tab-separated fields, where LSMDC has 6; get the file again."
                )
            sentences.append((fields[0], fields[5]))
        for clip, captions in _grouped(sentences).items():
            yield Clip(clip, files.video(f"{clip.split('.')[0][:-3]}/{clip}.avi"), tuple(captions), split)


def read_didemo(files: Files) -> Iterator[Clip]:
    """DiDeMo, paragraph retrieval: all descriptions of a video, joined, against its first 30 s, which is what was annotated.

    {split}_list.txt, where it is there, names the videos of the retrieval split (the JSON of the test split has 1,037, the split 1,004)."""
    for split in ("train", "val", "test"):
        descriptions = _grouped((item["video"], item["description"]) for item in files.json(f"{split}_data.json"))
        if files.has(f"{split}_list.txt"):
            names = files.lines(f"{split}_list.txt")
        else:
            names = list(descriptions)
            _note(f"{files.annotations} has no {split}_list.txt: all {len(names)} videos of {split}_data.json count, more than retrieval papers use.")
        for name in names:
            yield Clip(name, files.video(name), (" ".join(descriptions.get(name, ())),), split, 0.0, 30.0)


def read_charades(files: Files) -> Iterator[Clip]:
    """Charades: the script of each video. Ids are strings, whatever number they look like. Validation: a cut of the training videos."""
    rows = {split: files.rows(f"Charades_v1_{split}.csv", "id", "script") for split in ("train", "test")}
    held_out = _validation([row["id"] for row in rows["train"]])
    for split in ("train", "test"):
        for number, row in enumerate(rows[split], start=2):
            if not re.fullmatch("[A-Z0-9]{5}", row["id"]):
                raise DataError(f"{files.annotation(f'Charades_v1_{split}.csv')}, row {number}: {row['id']!r} is no video id (5 letters and digits); "
                                "a spreadsheet may have spoilt the file: unpack it again.")  # fmt: skip
            yield Clip(row["id"], files.video(f"{row['id']}.mp4"), (row["script"],), "val" if row["id"] in held_out else split)


def read_vatex(files: Files) -> Iterator[Clip]:
    """VATEX, English: 10 captions a clip. Validation and test are halves of the official validation set, named by {val,test}_list.txt (HGR).

    Without the lists the halves are a fixed cut, and numbers do not compare with published ones. `<id>.mp4` is a clip of 10 s;
    `<first 11 characters>.mp4`, where only that is there, is the whole YouTube video, of which the id names the seconds."""
    records = {name: {item["videoID"]: item["enCap"] for item in files.json(f"vatex_{name}_v1.0.json")} for name in ("training", "validation")}
    captions, rest = records["training"] | records["validation"], list(records["validation"])
    if files.has("test_list.txt") and files.has("val_list.txt"):
        splits = {name: split for split in ("val", "test") for name in files.lines(f"{split}_list.txt")}
    else:
        test = cut(rest, len(rest) // 2)
        splits = {name: "test" if name in test else "val" for name in rest}
        _note(
            f"{files.annotations} has no val_list.txt and test_list.txt (HGR's): a fixed cut stands in; numbers do not compare with published ones."
        )
    for name, split in (dict.fromkeys(records["training"], "train") | splits).items():
        path, whole, window = files.video(f"{name}.mp4"), files.video(f"{name[:11]}.mp4"), (0.0, None)
        if not path.is_file() and whole.is_file():
            path, window = whole, tuple(float(seconds) for seconds in name[12:].split("_"))
        yield Clip(name, path, tuple(captions.get(name, ())), split, *window)


def read_msvd(files: Files) -> Iterator[Clip]:
    """MSVD: some 41 captions a clip, in captions_msvd.json ({id: [sentence]}) or raw-captions.pkl ({id: [[word]]})."""
    if files.has("captions_msvd.json") or not files.has("raw-captions.pkl"):
        captions = files.json("captions_msvd.json")
    else:
        captions = {name: [" ".join(words) for words in texts] for name, texts in _plain_pickle(files.annotation("raw-captions.pkl")).items()}
    for split in ("train", "val", "test"):
        for name in files.lines(f"{split}_list.txt"):
            yield Clip(name, files.video(f"{name}.avi"), tuple(captions.get(name, ())), split)


def _plain_pickle(path: Path):
    """A pickle of dicts, lists and strings; anything that would run code is refused."""

    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    try:
        with path.open("rb") as file:
            return Plain(file).load()
    except (pickle.UnpicklingError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a plain pickle of captions ({error}): download it again.") from None


def read_csv(annotations: Path, videos: Path) -> list[Clip]:
    """Your own data: CSV (or JSONL, an object a line) of `video,caption[,split][,start,end]`, and the folder that holds the videos (or pictures).

    A video on several lines has several captions; one with several windows start..end (seconds) is several clips. Without a `split`
    column the videos are cut into train, val and test (80/10/10) by a hash of their name: the cut is the same on every machine.
    Raises DataError for a missing file or column, an unknown split, an empty caption or a clip in two splits."""
    if not annotations.is_file():
        raise DataError(f"{annotations} not found: give a CSV or JSONL file with video,caption[,split] by --annotations.")
    if not videos.is_dir():
        raise DataError(f"{videos} is not a folder: give the folder of video files by --videos.")
    if annotations.suffix == ".jsonl":
        try:
            rows = [json.loads(line) for line in _lines(annotations)]
            rows = [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
        except (json.JSONDecodeError, AttributeError) as error:
            raise DataError(f"{annotations} is not JSONL ({error}): write an object a line, with video and caption.") from None
        first = 1
    else:
        rows, first = _csv_rows(annotations, "video", "caption"), 2
    found, files, has_splits = {}, Files(videos), any(row.get("split") for row in rows)
    for line, row in enumerate(rows, start=first):
        name, caption, split = (row.get(column) or "" for column in ("video", "caption", "split"))
        if not name or not caption.strip():
            raise DataError(f"{annotations}, row {line}: the {'caption' if name else 'video'} is empty; fill it in or delete the row.")
        if split not in ("train", "val", "test") and has_splits:
            raise DataError(f"{annotations}, row {line}: the split of {name} is {split!r}; it must be train, val or test.")
        try:
            start, end = float(row.get("start") or 0), float(row["end"]) if row.get("end") else None
        except ValueError:
            raise DataError(f"{annotations}, row {line}: start and end are seconds, not {row.get('start')!r} and {row.get('end')!r}.") from None
        if start < 0 or (end is not None and end <= start):
            raise DataError(f"{annotations}, row {line}: the window from {start:g} to {end} s holds nothing; end must be later than start.")
        clip = name if (start, end) == (0.0, None) else f"{name} [{start:g}-{'' if end is None else f'{end:g}'}]"
        known = found.setdefault(clip, Clip(clip, files.video(name), (), split, start, end))
        if known.split != split:
            raise DataError(f"{annotations}, row {line}: {clip} is in two splits; a clip belongs to one.")
        found[clip] = replace(known, captions=(*known.captions, caption.strip()))
    if not has_splits:
        names = {clip.path.name for clip in found.values()}  # of videos: windows of one video stay together
        tenth = max(1, len(names) // 10)
        parts = {name: "val" for name in cut(names, 2 * tenth)} | {name: "test" for name in cut(names, tenth)}
        return [replace(clip, split=parts.get(clip.path.name, "train")) for clip in found.values()]
    return list(found.values())


def read_shapes(folder: Path, what: str = "clips") -> list[Clip]:
    """The built-in clips, rendered into `folder` when they are not there yet (shapes.py).

    what="pictures": the still pictures of one scene that the small CLIP is pretrained on. Raises DataError."""
    try:
        shapes.render(folder)
    except (OSError, RuntimeError) as error:
        raise DataError(str(error)) from None
    return read_csv(folder / f"{what}.csv", folder / what)


READERS: dict[str, Callable[[Files], Iterator[Clip]]] = {
    "msrvtt": read_msrvtt,
    "msrvtt-7k": partial(read_msrvtt, train="7k"),
    "msrvtt-full": partial(read_msrvtt, train="full"),
    "lsmdc": read_lsmdc,
    "didemo": read_didemo,
    "charades": read_charades,
    "vatex": read_vatex,
    "msvd": read_msvd,
}
# What a user has to get, by the data set's folder below --data: the annotation files without which nothing is read, and the rest.
NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "msrvtt": (("MSRVTT_data.json", "MSRVTT_train.9k.csv or MSRVTT_train.7k.csv", "MSRVTT_JSFUSION_test.csv"),
               "the videos video0.mp4 to video9999.mp4: msrvtt_data.zip of github.com/ArrowLuo/CLIP4Clip's releases and MSRVTT.zip of "
               "github.com/m-bain/frozen-in-time"),
    "lsmdc": (("LSMDC16_annos_training.csv", "LSMDC16_annos_val.csv", "LSMDC16_challenge_1000_publictect.csv"),
              "the .avi clips: a signed licence, by sites.google.com/site/describingmovies/download"),
    "didemo": (("train_data.json", "val_data.json", "test_data.json"),
               "the Flickr videos (github.com/LisaAnne/LocalizingMoments), and for the split of retrieval papers train_list.txt, val_list.txt, "
               "test_list.txt (github.com/albanie/collaborative-experts)"),
    "charades": (("Charades_v1_train.csv", "Charades_v1_test.csv"), "the videos of Charades_v1_480 (prior.allenai.org/projects/charades)"),
    "vatex": (("vatex_training_v1.0.json", "vatex_validation_v1.0.json"),
              "the YouTube clips (eric-xw.github.io/vatex-website), and for the split of retrieval papers HGR's val_list.txt and test_list.txt"),
    "msvd": (("captions_msvd.json or raw-captions.pkl", "train_list.txt", "val_list.txt", "test_list.txt"),
             "the .avi clips (cs.utexas.edu/users/ml/clamp/videoDescription); the lists are in msvd_data.zip of github.com/ArrowLuo/CLIP4Clip's "
             "releases"),
}  # fmt: skip


def open_files(dataset: str, data: Path, annotations: Path | None = None, videos: Path | None = None) -> Files:
    """The files of one of READERS' data sets. Raises DataError that says what to get and where to put it, where there is no such folder."""
    if dataset not in READERS:
        raise DataError(f"unknown data set {dataset!r}; choose one of shapes, csv, {', '.join(READERS)}.")
    name = dataset.split("-")[0]
    root, (names, rest) = annotations or data / name, NEEDS[name]
    needs = f"{name} needs {', '.join(names)} and {rest}. Put them anywhere below {root}, or try --dataset shapes, which is built in."
    return Files(root, videos, needs)


def read_clips(dataset: str, data: Path, annotations: Path | None = None, videos: Path | None = None) -> list[Clip]:
    """All clips of a data set, of every split, whether their videos are there or not (`FrameCache.fill` says).

    `data`: the folder of data sets, with one folder for each; `annotations`, `videos`: other places for them; for "csv", the file and the
    folder. Raises DataError where annotations are missing or broken, saying what to get and where to put it."""
    if dataset in ("shapes", "pictures"):
        return read_shapes(data / "shapes", "clips" if dataset == "shapes" else "pictures")
    if dataset == "csv":
        if annotations is None or videos is None:
            raise DataError("--dataset csv needs --annotations FILE (video,caption[,split]) and --videos DIR.")
        return read_csv(annotations, videos)
    files = open_files(dataset, data, annotations, videos)
    root = files.annotations
    try:
        clips = list(READERS[dataset](files))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"the annotations below {root} have another form than {dataset}'s (they lack {error}): {files.needs}") from None
    seen: dict[str, str] = {}
    for clip in clips:
        if clip.split not in ("train", "val", "test"):
            raise DataError(f"the annotations below {root} give {clip.id} no split (train, validate or test): {files.needs}")
        if not any(caption.strip() for caption in clip.captions) or not all(clip.captions):
            raise DataError(
                f"the annotations below {root} have no caption for {clip.id}, or an empty one: get them again, or take the clip off its list."
            )
        if clip.id in seen:
            raise DataError(f"the annotations below {root} have {clip.id} twice, in {seen[clip.id]} and in {clip.split}: get them again.")
        seen[clip.id] = clip.split
    return clips


def of_split(clips: Sequence[Clip], split: str) -> list[Clip]:
    """The clips of one split, in file order. Raises DataError when there is none."""
    chosen = [clip for clip in clips if clip.split == split]
    if not chosen:
        raise DataError(f"no clip has split {split!r}: mark some in the `split` column of the annotations.")
    return chosen


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------- frames out of a video


SHORT_FILE, SHORT_PIPE = 2**18, 2**25  # bytes: files under the first are read whole, up to the second


def segment_midpoints(count: int, num_frames: int) -> list[int]:
    """Frame numbers at the middle of `num_frames` equal segments of a clip of `count` frames; short clips repeat frames."""
    return [(2 * k + 1) * count // (2 * num_frames) for k in range(num_frames)]


def _ffmpeg(path: Path, window: dict[str, float], **options) -> tuple[bytes, str]:
    """What ffmpeg writes for the first real video stream of a file, within a window {ss, t} of seconds: (its output, its log)."""
    try:
        output = ffmpeg.input(f"file:{path}", threads=1, **window).output("pipe:", map="0:v:0", **options).global_args("-nostdin", "-v", "verbose")
        stdout, log = output.run(cmd=imageio_ffmpeg.get_ffmpeg_exe(), capture_stdout=True, capture_stderr=True)
    except ffmpeg.Error:
        raise DataError(f"{path} holds no readable video (empty, broken or not a video file): replace it or delete its rows.") from None
    except UnicodeEncodeError:
        raise DataError(f"{os.fsencode(path)} is a name that is no UTF-8: rename the file.") from None
    log = log.decode(errors="replace")
    if "partial file" in log:
        raise DataError(f"{path} is truncated: its index promises more than the file holds; copy or download it again.")
    if (errors := re.search(r"(\d+) decode errors", log)) and int(errors[1]):
        raise DataError(f"{path} is damaged: {errors[1]} of its frames cannot be decoded; copy or download it again.")
    return stdout, log


def _count(log: str, what: str) -> int:
    """How many "packets read", "frames decoded" or "frames encoded" the log of ffmpeg tells of; 0 where it tells nothing."""
    found = re.search(rf"\(video\):.*?(\d+) {what}", log)
    return int(found[1]) if found else 0


def _pixels(path: Path, window: dict[str, float], **options) -> tuple[list[UInt8[np.ndarray, "height width 3"]], int]:
    """Decoded frames as arrays, and how many frames the decoder found in all."""
    stdout, log = _ffmpeg(path, window, format="image2pipe", vcodec="ppm", pix_fmt="rgb24", fps_mode="passthrough", **options)
    frames, position = [], 0
    while header := re.compile(rb"P6\s(\d+)\s(\d+)\s255\s").match(stdout, position):
        width, height = int(header[1]), int(header[2])
        if header.end() + width * height * 3 > len(stdout):
            break
        frames.append(np.frombuffer(stdout, np.uint8, width * height * 3, header.end()).reshape(height, width, 3))
        position = header.end() + width * height * 3
    return frames, _count(log, "frames decoded") or len(frames)


def decode_frames(path: Path, num_frames: int, start: float = 0.0, end: float | None = None) -> list[UInt8[np.ndarray, "height width 3"]]:
    """`num_frames` frames of a video at the midpoints of equal segments, exact to the frame, rotated as the file says, in its own size.

    start, end: seconds; the frames shown at start <= time < end are divided. Long files take two ffmpeg processes, one that counts and
    one that decodes the chosen frame numbers (a whole file is counted by its packets, a window by decoding it); short files are read whole by one.
    A picture file counts as a clip of one frame. Raises DataError for a file that is missing, unreadable, truncated or damaged."""
    if not path.is_file():
        raise DataError(f"{path} not found: add the file or delete its rows.")
    if path.suffix.lower() in PICTURE_SUFFIXES:
        try:
            return [np.asarray(Image.open(path).convert("RGB"))] * num_frames
        except (UnidentifiedImageError, OSError):
            raise DataError(f"{path} is not a readable picture: replace it or delete its rows.") from None
    window = ({"ss": start} if start else {}) | ({} if end is None else {"t": end - start})
    if not window and path.stat().st_size < SHORT_FILE:
        frames, count = _pixels(path, window, fs=SHORT_PIPE)
        if 0 < count == len(frames):
            return [frames[n] for n in segment_midpoints(count, num_frames)]
    if window:
        count = _count(_ffmpeg(path, window, format="null", fps_mode="passthrough")[1], "frames encoded")
    else:
        count = _count(_ffmpeg(path, window, vcodec="copy", format="null")[1], "packets read")
    for _ in range(2):  # a file can hold packets that are never shown (edit lists): then the decoder's count is the true one
        if count == 0:
            break
        numbers = sorted(set(wanted := segment_midpoints(count, num_frames)))
        frames, decoded = _pixels(path, window, vf="select=" + "+".join(f"eq(n\\,{n})" for n in numbers))
        if (window or decoded == count) and len(frames) == len(numbers):
            return [frames[numbers.index(n)] for n in wanted]
        count = decoded
    where = f" from {start:g} s" + (f" to {end:g} s" if end is not None else "") if window else ""
    raise DataError(f"{path} holds no frame{where} that can be decoded: replace it or delete its rows.")


def duration(path: Path) -> float:
    """Seconds of a video, by the time of its last packet: nothing is decoded, and the file's header need not say. Raises DataError."""
    times = re.findall(r"time=(\d+):(\d+):([\d.]+)", _ffmpeg(path, {}, vcodec="copy", format="null")[1])
    if not times:
        raise DataError(f"{path} holds no frame: replace it or delete its rows.")
    return float(times[-1][0]) * 3600 + float(times[-1][1]) * 60 + float(times[-1][2])


# ------------------------------------------------------------------------------------------------------------ CLIP's preprocessing


MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures
STD = (0.26862954, 0.26130258, 0.27577711)


def resize(frame: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[np.ndarray, "new_height new_width 3"]:
    """Pillow's bicubic resize that makes the shorter side `size` pixels."""
    height, width = frame.shape[:2]
    short = min(height, width)
    new = (size, size * height // width) if width == short else (size * width // height, size)
    return np.asarray(Image.fromarray(frame).resize(new, Image.Resampling.BICUBIC))


def center_crop(frames: UInt8[Tensor, "frames 3 height width"], size: int) -> UInt8[Tensor, "frames 3 size size"]:
    """The middle square, as torchvision rounds it."""
    top, left = (round((side - size) / 2) for side in frames.shape[-2:])
    return frames[..., top : top + size, left : left + size]


def augment(frames: UInt8[Tensor, "frames 3 height width"], size: int, generator: torch.Generator) -> UInt8[Tensor, "frames 3 size size"]:
    """RandomResizedCrop(scale 0.5 to 1, ratio 3/4 to 4/3) and a horizontal flip, drawn once and applied to all frames of a clip."""
    height, width = frames.shape[-2:]
    uniform = torch.rand(10, 2, generator=generator)
    crop_h, crop_w = min(height, width), min(height, width)  # where no draw fits
    for area, ratio in uniform.tolist():
        area, ratio = (0.5 + 0.5 * area) * height * width, (3 / 4) * (16 / 9) ** ratio
        h, w = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
        if 0 < h <= height and 0 < w <= width:
            crop_h, crop_w = h, w
            break
    x, y, flip = torch.rand(3, generator=generator).tolist()
    top, left = int(y * (height - crop_h + 1)), int(x * (width - crop_w + 1))
    frames = frames[..., top : top + crop_h, left : left + crop_w]
    frames = F.interpolate(frames, (size, size), mode="bicubic", antialias=True)
    return frames.flip(-1) if flip < 0.5 else frames


def normalise(images: UInt8[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 height width"]:
    """Bytes to CLIP's input: (x / 255 - mean) / std. Done on the device, so that a quarter of the bytes travel."""
    mean, std = _mean_and_std(images.device)
    return (images / 255 - mean) / std


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Copied to a device once: a copy in each step makes a GPU wait."""
    return torch.tensor(MEAN, device=device).view(3, 1, 1), torch.tensor(STD, device=device).view(3, 1, 1)


def tokenize(captions: Sequence[str], context_length: int = 77) -> Int[Tensor, "texts tokens"]:
    """CLIP's byte-pair tokens with start and end marks; longer captions are cut and keep their end mark."""
    return _import_clip().tokenize(list(captions), context_length, truncate=True)


def _import_clip():
    try:
        with warnings.catch_warnings(action="ignore"):  # clip imports pkg_resources, which warns of its age
            import clip
    except RuntimeError:  # PyPI's torchvision is a CUDA build: beside a CPU-only torch it lacks two schemas (model.py has the same)
        _import_clip.schemas = torch.library.Library("torchvision", "DEF")
        for name in ("nms(Tensor dets, Tensor scores, float iou_threshold)", "qnms(Tensor dets, Tensor scores, float iou_threshold)"):
            _import_clip.schemas.define(f"{name} -> Tensor")
        return _import_clip()
    return clip


# ------------------------------------------------------------------------------------------------------------------ caches, loader


CHOICES = {"uniform": 1, "random": 5}  # frames kept of each segment, by --sampling


class FrameCache:
    """Decoded frames on disk, one file a clip: a zip of JPEG pictures (quality 95, full colour), the shorter side already `size` pixels.

    Each of the `num_frames` segments of a clip keeps `choices` frames (an odd number), evenly spaced, the middle one of them the segment's
    midpoint: so the same file serves uniform sampling and, with more than one, random sampling. A file remembers what it was made from (id, window,
    bytes and time of change of the video), so a changed video is decoded again; a video that is gone is read from the cache. It is
    written under another name first, so that one that exists is whole. JPEG costs 1 to 2 of 255 levels on average; no cache is 7 times larger."""

    QUALITY = 95

    def __init__(self, folder: Path, num_frames: int, size: int, choices: int = 1):
        assert choices % 2 == 1, "the middle choice is the midpoint"
        self.num_frames, self.size, self.choices = num_frames, size, choices
        self.folder = folder / f"{num_frames}{f'x{choices}' if choices > 1 else ''}frames-{size}px-jpeg{self.QUALITY}"

    def path(self, clip: Clip) -> Path:
        """Where the frames of a clip are, or would be: the clip's id, with what a file name cannot hold as %XX."""
        return self.folder / f"{file_name(clip)}.zip"

    def _open(self, clip: Clip) -> zipfile.ZipFile | None:
        """The frames of a clip, if they are there, whole, and made from the video as it is now."""
        try:
            file = zipfile.ZipFile(self.path(clip))
        except (OSError, zipfile.BadZipFile):
            return None
        return file if is_current(file.comment, clip) else None

    def frames(self, clip: Clip, generator: torch.Generator | None = None) -> UInt8[np.ndarray, "frames height width 3"]:
        """The frames of a clip: from the cache, else decoded and kept there. The segments' midpoints, or with a `generator` a random
        choice in each segment. Raises DataError."""
        file = self._open(clip)
        if file is None:
            self._decode(clip)
            file = zipfile.ZipFile(self.path(clip))
        picks = torch.full((self.num_frames,), self.choices // 2)
        if generator is not None:
            picks = torch.randint(self.choices, (self.num_frames,), generator=generator)
        with file:
            pictures = [Image.open(io.BytesIO(file.read(f"{k * self.choices + pick:03d}.jpg"))) for k, pick in enumerate(picks.tolist())]
        return np.stack([np.asarray(picture) for picture in pictures])

    def _decode(self, clip: Clip) -> None:
        made_from = source(clip)  # before decoding: a video that changes meanwhile is decoded again
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as file:
            for k, frame in enumerate(decode_frames(clip.path, self.num_frames * self.choices, clip.start, clip.end)):
                picture = io.BytesIO()
                Image.fromarray(resize(frame, self.size)).save(picture, "JPEG", quality=self.QUALITY, subsampling=0)
                file.writestr(zipfile.ZipInfo(f"{k:03d}.jpg"), picture.getvalue())  # a ZipInfo has no date: the same frames are the same bytes
            file.comment = made_from
        write_whole(self.path(clip), content.getvalue())

    def fill(self, clips: Sequence[Clip]) -> dict[str, str]:
        """Decodes what is not there yet, on all cores. Returns what could not be: {id of the clip: one sentence why}, in the clips' order."""
        remove_leftovers(self.folder)
        todo = [clip for clip in clips if self._open(clip) is None]
        reasons = in_parallel(self._try, todo, "decoding frames")
        return {clip.id: reason for clip, reason in zip(todo, reasons) if reason}

    def _try(self, clip: Clip) -> str | None:
        try:
            self._decode(clip)
        except DataError as error:
            return str(error)


class FeatureCache:
    """phi_v of the frames of a clip on disk, one .npz a clip, float32 (frames, dim): for training psi and R without CLIP, videos or frames.

    `weights` is a hash of the weights that made the features; like frames, they are made anew when the video has changed."""

    def __init__(self, frames: FrameCache, weights: str):
        self.frames, self.folder = frames, frames.folder / f"features-{weights}"

    def path(self, clip: Clip) -> Path:
        """Where the features of a clip are, or would be."""
        return self.folder / f"{file_name(clip)}.npz"

    def load(self, clip: Clip) -> Float[Tensor, "frames dim"] | None:
        """The features of a clip, None where there are none or the video has changed since."""
        try:
            with np.load(self.path(clip)) as file:
                return torch.from_numpy(file["features"]) if is_current(file["made_from"].tobytes(), clip) else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, clip: Clip, features: Float[Tensor, "frames dim"]) -> None:
        """Keeps the features of a clip whose frames are in the cache."""
        content = io.BytesIO()
        with zipfile.ZipFile(self.frames.path(clip)) as file:
            np.savez(content, features=features.cpu().numpy(), made_from=np.frombuffer(file.comment, np.uint8))
        write_whole(self.path(clip), content.getvalue())


def cache_folder(dataset: str, data: Path, videos: Path | None = None) -> Path:
    """Where a data set's frames are cached, data/cache/DATASET; your own videos' (csv) have a folder for each folder of videos."""
    own = f"-{hashlib.sha256(str(videos.resolve()).encode()).hexdigest()[:8]}" if dataset == "csv" and videos else ""
    return data / "cache" / f"{dataset.split('-')[0]}{own}"


def file_name(clip: Clip) -> str:
    """A clip's id as a file name: %XX for what is no letter, digit or one of _.-~; long ones end in a hash."""
    name = urllib.parse.quote(clip.id, safe="")
    return name if len(name) <= 150 else f"{name[:100]}~{hashlib.sha256(clip.id.encode()).hexdigest()[:16]}"


def source(clip: Clip) -> bytes:
    """What a clip's frames are made from, in a line: id, window, bytes and time of change. Empty where the video is not there."""
    try:
        stat = clip.path.stat()
    except OSError:
        return b""
    return f"{clip.id} {clip.start:g} {clip.end} {stat.st_size} {stat.st_mtime_ns}".encode()


def is_current(made_from: bytes, clip: Clip) -> bool:
    """Whether something cached was made from a clip as it is now; a video that is gone is taken not to have changed."""
    now = source(clip)
    return made_from == now if now else made_from.startswith(f"{clip.id} {clip.start:g} {clip.end} ".encode())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that one that has the name is whole, whenever the process is killed. Raises DataError (disk full, no right to write)."""
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written ({error.strerror}): make room or name another --data; what is written stays.") from None


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes of this machine left half written."""
    for path in folder.glob(f"*.{socket.gethostname()}.*.part"):
        try:
            os.kill(int(path.name.split(".")[-2]), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except PermissionError:  # alive, and another user's
            pass


def in_parallel(work: Callable[[T], R], clips: Sequence[T], what: str) -> list[R]:
    """What `work` says of each clip, on all cores (each clip's ffmpeg is a process of its own), with a progress bar."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        return list(tqdm(pool.map(work, clips), total=len(clips), desc=what, unit=" clips", disable=len(clips) < 50))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for what has not begun


def epoch_batches(clips: Sequence[Clip], batch_size: int, seed: int, epoch: int) -> list[list[tuple[int, int]]]:
    """The batches of one epoch, as (clip, caption) numbers: every caption once, and no clip twice in a batch.

    Two captions of one clip in a batch would be each other's false negatives. So an epoch runs in rounds; a round takes every clip
    (that has captions left) once, in a new random order, each with its next caption of a random order. A round's last, smaller batch
    is left out unless it is the only one. The order depends on (seed, epoch) alone."""
    rng = np.random.default_rng([seed, epoch])
    order = [rng.permutation(len(clip.captions)) for clip in clips]
    batches = []
    for turn in range(max(len(captions) for captions in order)):
        round_ = [(int(c), int(order[c][turn])) for c in rng.permutation(len(clips)) if turn < len(order[c])]
        whole = len(round_) - len(round_) % batch_size or len(round_)
        batches += [round_[k : k + batch_size] for k in range(0, whole, batch_size)]
    return batches


class ClipDataset(torch.utils.data.Dataset):
    """Items (images, tokens): uint8 (frames, 3, size, size) and the tokens of one caption.

    `dataset[clip, caption]` is the plain item: the midpoints of the segments, the middle square. With `augmentation=(seed, epoch)` it is
    cropped and flipped at random, with `sampling=(seed, epoch)` each segment gives a random frame (of those that the cache keeps); both
    depend on nothing but seed, epoch, clip and caption: not on workers, nor on what was loaded before. With `features` (videos, frames, dim)
    set, an item holds the features of its clip in the place of its images; `tokens`, a tensor a clip, may hold features of captions as well."""

    features: Float[Tensor, "videos frames dim"] | None = None
    sampling: tuple[int, int] | None = None

    def __init__(self, clips: Sequence[Clip], cache: FrameCache, context_length: int = 77, augmentation: tuple[int, int] | None = None):
        self.clips, self.cache, self.augmentation = clips, cache, augmentation
        tokens = tokenize([caption for clip in clips for caption in clip.captions], context_length)
        self.tokens = tokens.split([len(clip.captions) for clip in clips])

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(
        self, index: int | tuple[int, int]
    ) -> tuple[UInt8[Tensor, "frames 3 size size"] | Float[Tensor, "frames dim"], Int[Tensor, " tokens"] | Float[Tensor, " dim"]]:
        clip, caption = index if isinstance(index, tuple) else (index, 0)
        if self.features is not None:
            return self.features[clip], self.tokens[clip][caption]

        def luck(seed_and_epoch: tuple[int, int]) -> torch.Generator:
            return torch.Generator().manual_seed(int(np.random.SeedSequence([*seed_and_epoch, clip, caption]).generate_state(1)[0]))

        frames = self.cache.frames(self.clips[clip], luck(self.sampling) if self.sampling else None)
        images = torch.from_numpy(frames).permute(0, 3, 1, 2)
        if self.augmentation is None:
            images = center_crop(images, self.cache.size)
        else:
            images = augment(images, self.cache.size, luck(self.augmentation))
        return images.contiguous(), self.tokens[clip][caption]


def batches(
    dataset: ClipDataset, indices: list[list[tuple[int, int]]] | list[list[int]], workers: int = 0, pin_memory: bool = False
) -> Iterator[tuple[UInt8[Tensor, "videos frames 3 size size"], Int[Tensor, "texts tokens"]]]:
    """Loads the given batches in their order, ahead of use in `workers` processes. Raises DataError."""
    for batch in torch.utils.data.DataLoader(_Batches(dataset, indices), batch_size=None, num_workers=workers, pin_memory=pin_memory):
        if isinstance(batch, DataError):
            raise batch
        yield batch


@dataclass(frozen=True)
class _Batches(torch.utils.data.Dataset):
    """Whole batches as items; a DataError is one too, since torch would add a worker's traceback to the sentence of one that is raised."""

    dataset: ClipDataset
    indices: list

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int):
        try:
            return torch.utils.data.default_collate([self.dataset[index] for index in self.indices[number]])
        except DataError as error:
            return error


# -------------------------------------------------------------------------------------------------------------------- command line


def check(
    dataset: str = "shapes",
    data: Path = Path("data"),
    annotations: Path | None = None,
    videos: Path | None = None,
    read: bool = True,
) -> int:
    """Says what of a data set is there, split by split, and the first thing to mend. Exit code 0: training can start.

    Args:
        dataset: msrvtt, msrvtt-7k, msrvtt-full, lsmdc, didemo, charades, vatex, msvd, csv or shapes
        data: folder of data sets
        annotations: for csv: the file; for the others: the folder, where it is not DATA/DATASET
        videos: the folder of videos, where it is another one
        read: open every video (not only look whether it is there)
    """
    if dataset in READERS:
        files = open_files(dataset, data, annotations, videos)
        for name in NEEDS[dataset.split("-")[0]][0]:
            found = [str(files.annotation(other)) for other in name.split(" or ") if files.has(other)]
            print(f"{name}: {', '.join(found) or 'not found'}")
    clips = read_clips(dataset, data, annotations, videos)
    encode = _import_clip().clip._tokenizer.encode
    reasons = in_parallel(partial(_unreadable, read=read), clips, "opening videos")
    found = sum(clip.path.is_file() for clip in clips)
    print(f"{dataset}: {found} of {len(clips)} videos found, {sum(len(clip.captions) for clip in clips)} captions\n")
    print(f"{'split':<6} {'clips':>8} {'missing':>8} {'unreadable':>11} {'captions':>9} {'tokens: median':>15} {'longest':>8} {'over 77':>8}")
    usable = {}
    for split in ("train", "val", "test"):
        own = [(clip, reason) for clip, reason in zip(clips, reasons) if clip.split == split]
        missing = sum("not found" in reason for _, reason in own if reason)
        unreadable = sum(reason is not None for _, reason in own) - missing
        usable[split] = len(own) - missing - unreadable
        tokens = np.array([len(encode(caption)) + 2 for clip, _ in own for caption in clip.captions] or [0])
        print(f"{split:<6} {len(own):>8} {missing:>8} {unreadable:>11} {sum(len(clip.captions) for clip, _ in own):>9} {np.median(tokens):>15.0f} "
              f"{tokens.max():>8} {(tokens > 77).sum():>8}")  # fmt: skip
    first = next((reason for reason in reasons if reason), None)
    empty = next((split for split in ("train", "val") if not usable[split]), None)
    if first:
        print(f"\nfirst to mend: {first}")
    if empty:
        print(f"training cannot start: no clip of split {empty} can be read.")
    elif first:
        print("training can start: it skips such clips and lists them in its run's folder; evaluate.py refuses to, unless by --allow-missing.")
    else:
        print("\ntraining can start.")
    return 1 if empty else 0


def _unreadable(clip: Clip, read: bool) -> str | None:
    """Why a clip's video cannot be used, as far as opening it and counting its packets tells."""
    if not clip.path.is_file():
        return f"{clip.path} not found: add the file, or train without it."
    if not read:
        return None
    try:
        if clip.path.suffix.lower() in PICTURE_SUFFIXES:
            decode_frames(clip.path, 1)
        elif not _count(_ffmpeg(clip.path, {}, vcodec="copy", format="null")[1], "packets read"):
            return f"{clip.path} holds no frame: replace it, or train without it."
    except DataError as error:
        return str(error)
    return None


def cache(
    dataset: str = "shapes",
    data: Path = Path("data"),
    annotations: Path | None = None,
    videos: Path | None = None,
    num_frames: int = 12,
    size: int | None = None,
    sampling: Literal["uniform", "random"] = "uniform",
    features: bool = False,
    arch: str = "ViT-B/32",
    weights: Path | None = None,
    device: str = "auto",
) -> int:
    """Decodes every clip once into DATA/cache, on all cores; goes on where it was stopped. Exit code 1: some clips could not be decoded.

    Args:
        dataset: msrvtt, msrvtt-7k, msrvtt-full, lsmdc, didemo, charades, vatex, msvd, csv or shapes
        data: folder of data sets and of the cache
        annotations: for csv: the file; for the others: the folder, where it is not DATA/DATASET
        videos: the folder of videos, where it is another one
        num_frames: frames a clip
        size: pixels of the shorter side, the model's resolution; default: 224, as ViT-B, and 64, as tiny, for the built-in clips
        sampling: random: keep five frames a segment, for train.py --sampling random
        features: also keep CLIP's features of the frames, for train.py --freeze vision or clip; then size is the model's
        arch: the CLIP that makes them: ViT-B/32, ViT-B/16, tiny, or a file of weights
        weights: CLIP's weights as a file, for machines without network
        device: auto, cpu, cuda: where features are made
    """
    model, size = None, size or (64 if dataset in ("shapes", "pictures") else 224)
    if features:
        from evaluate import choose_device, extract_features, feature_cache  # this command alone knows of models
        from model import TMASS, load_clip

        model = TMASS(load_clip(arch, weights), "clip", num_frames).to(choose_device(device))
        size = model.resolution
    clips = read_clips(dataset, data, annotations, videos)
    frames = FrameCache(cache_folder(dataset, data, videos), num_frames, size, CHOICES[sampling])
    failures = frames.fill(clips)
    there = [clip for clip in clips if clip.id not in failures]
    if model is not None:
        extract_features(model, there, frames, store=feature_cache(frames, model), keep=True)
    total = sum(path.stat().st_size for path in frames.folder.rglob("*") if path.is_file())
    print(f"{len(there)} of {len(clips)} clips are in {frames.folder}: {total / 2**20:.0f} MiB, {total / 2**10 / max(1, len(there)):.0f} KiB a clip.")
    for reason in list(failures.values())[:20]:
        print(f"failed: {reason}")
    if len(failures) > 20:
        print(f"and {len(failures) - 20} more.")
    return 1 if failures else 0


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: check or cache. Anything wrong with the input ends it with one sentence and exit code 1."""
    import tyro

    try:
        sys.exit(tyro.extras.subcommand_cli_from_dict({"check": check, "cache": cache}, args=arguments, description=__doc__))
    except ValueError as error:  # DataError, ModelError
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on from here.")


if __name__ == "__main__":
    main()
