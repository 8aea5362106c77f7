"""The data sets: annotation files become one record a clip (`Clip`). Each data set is one registered reader.

To add a data set, write one function here. It can then be used as `--dataset mine`:

    @register("mine", needs=("captions.json",), also="the videos of example.org")
    def read_mine(files: Files) -> Iterator[Clip]:
        for item in files.json("captions.json"):
            yield Clip(item["id"], files.video(item["file"]), tuple(item["captions"]), item["split"])
"""

import hashlib
import math
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool

import shapes
from engine.files import PICTURE_SUFFIXES, DataError
from engine.finding import Files, grouped, normal
from engine.tables import NO_TEXT, SPLITS, Row, like_name, read_own_rows, shown
from engine.tables import read_lines as read_lines  # "as": a re-export


@dataclass(frozen=True)
class Clip:
    """One video clip with all its captions: the record that every reader yields."""

    id: str
    path: Path
    captions: tuple[str, ...] = field(repr=False)
    split: str
    start: float = 0.0  # seconds
    end: float | None = None  # None: the end of the file
    held_out: bool = field(default=False, repr=False)  # split val, but taken from the training clips by us


# ---- registry


@dataclass(frozen=True)
class Dataset:
    """A registered data set; see `register`. folder: its folder below --data and below the cache."""

    read: Callable[..., Iterable[Clip]]
    needs: tuple[str, ...]
    also: str
    folder: str
    relevance: Callable[[Sequence[Clip]], np.ndarray | None] | None = None


DATASETS: dict[str, Dataset] = {}


def register(
    name: str, needs: tuple[str, ...] = (), also: str = "", like: str | None = None, relevance=None
) -> Callable:
    """A decorator that adds a reader to DATASETS.

    needs: the annotation files it must have ("a or b": one of them). also: what else to get, and where.
    like: a data set with the same folder and files, in place of needs and also.
    relevance: a function of clips that knows which fit which of their captions, (texts, videos), or None.
    The reader is called with a Files; if it needs no files, with the paths (data, annotations, videos)."""

    def decorate(read: Callable[..., Iterable[Clip]]) -> Callable[..., Iterable[Clip]]:
        DATASETS[name] = (
            replace(DATASETS[like], read=read) if like else Dataset(read, needs, also, name, relevance)
        )
        return read

    return decorate


def find_dataset(name: str) -> Dataset:
    """The data set of a name. Raises DataError for an unknown one."""
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}.")
    return DATASETS[name]


def open_files(
    dataset: str, data: Path, annotations: Path | None = None, videos: Path | None = None
) -> Files:
    """The files of a data set, below DATA/DATASET or the folders given. Raises DataError without them."""
    found = find_dataset(dataset)
    root = annotations or data / found.folder
    needs = f"{found.folder} needs {', '.join(found.needs)} and {found.also}. Put them anywhere below {root}"
    return Files(root, videos, f"{needs}, or try --dataset shapes, which is built in.")


def read_clips(
    dataset: str, data: Path, annotations: Path | None = None, videos: Path | None = None
) -> list[Clip]:
    """All clips of a data set, in all splits. Videos may be missing: `FrameCache.fill` reports them.

    data: the folder of data sets. annotations, videos: other folders to use; for csv, a file and a folder.
    Raises DataError if annotations are missing or wrong; it says what to get and where to put it."""
    found = find_dataset(dataset)
    if not found.needs:
        return list(found.read(data, annotations, videos))
    files = open_files(dataset, data, annotations, videos)
    where = f"the annotations below {files.annotations}"
    try:
        clips = list(found.read(files))
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise DataError(f"{where} have another form than {dataset}'s ({error!r}): {files.needs}") from None
    seen: dict[str, str] = {}
    for clip in clips:
        _check(clip, where, files.needs)
        if clip.id in seen:
            raise DataError(f"{where} have {clip.id} twice ({seen[clip.id]}, {clip.split}): get them again.")
        seen[clip.id] = clip.split
    return clips


def _check(clip: Clip, where: str, needs: str) -> None:
    """Raises DataError if a clip of a public data set cannot be used."""
    if not isinstance(clip.id, str) or NO_TEXT.search(clip.id) or len(clip.path.name.encode()) > 255:
        raise DataError(f"{where} have the id {shown(clip.id)}, which is no name of a video: correct it.")
    if clip.split not in SPLITS:
        raise DataError(f"{where} give {clip.id} no split (train, validate or test): {needs}")
    for caption in clip.captions:
        if NO_TEXT.search(caption):
            raise DataError(f"{where} have {shown(caption)} for {clip.id}, which is no text: correct it.")
    if not any(caption.strip() for caption in clip.captions) or not all(clip.captions):
        raise DataError(f"{where} have no caption for {clip.id}, or an empty one: add or remove it.")
    if not 0 <= clip.start < _end(clip) or clip.end == math.inf:
        raise DataError(f"{where} give {clip.id} an empty or endless window: correct its id.")


def of_split(clips: Sequence[Clip], split: str) -> list[Clip]:
    """The clips of one split, in their order. Raises DataError if there is none."""
    chosen = [clip for clip in clips if clip.split == split]
    if not chosen:
        advice = "mark some in the `split` column of the annotations"
        advice += ", or take some from training: train.py --val N" if split == "val" else ""
        raise DataError(f"no clip has split {split!r}: {advice}.")
    return chosen


def without(clips: Sequence[Clip], skipped: dict[str, str]) -> list[Clip]:
    """The clips that are not skipped. Raises DataError if there were some and none is left."""
    left = [clip for clip in clips if clip.id not in skipped]
    if clips and not left:
        reason = skipped[clips[0].id]
        raise DataError(f"none of the {len(clips)} {clips[0].split} clips can be read: {reason}")
    return left


def with_validation(clips: Sequence[Clip], val: str, seed: int) -> list[Clip]:
    """The clips with the validation split that --val asks for; test clips stay as they are.

    "official": as read. "none": without validation; clips that the reader held out from training are trained
    on. A number: so many training videos, chosen by the seed, in place of the reader's validation; all clips
    of a file stay together. Raises DataError if no training video would be left."""
    if val == "official":
        return list(clips)
    clips = [replace(clip, split="train", held_out=False) if clip.held_out else clip for clip in clips]
    clips = [clip for clip in clips if clip.split != "val"]
    if val == "none":
        return clips
    videos = {clip.path.name for clip in clips if clip.split == "train"}
    if int(val) >= len(videos):
        raise DataError(f"--val {val} leaves none of the {len(videos)} training videos: give a smaller one.")
    chosen = held_out(videos, int(val), f"{seed} ")
    taken = [clip.split == "train" and clip.path.name in chosen for clip in clips]
    return [replace(clip, split="val", held_out=True) if out else clip for clip, out in zip(clips, taken)]


def cache_folder(dataset: str, data: Path, videos: Path | None = None) -> Path:
    """The folder of cached frames: DATA/cache/DATASET, and for csv another one for each folder of videos."""
    folder = find_dataset(dataset).folder
    if dataset == "csv" and videos:
        folder += f"-{hashlib.sha256(str(videos.resolve()).encode()).hexdigest()[:8]}"
    return data / "cache" / folder


def held_out(names: Iterable[str], count: int, salt: str = "") -> set[str]:
    """`count` of the names, chosen by a hash: the same on every machine, and stable if names are added."""
    order = sorted(names, key=lambda name: hashlib.sha256((salt + normal(name)).encode()).digest())
    return set(order[:count])


def _validation(train: Sequence[str]) -> set[str]:
    """Clips to hold out where there is no validation split: a tenth of the training clips, at most 1,000."""
    return held_out(train, min(1000, max(1, len(train) // 10)))


# ---- built in, and your own data


def register_shapes(name: str, seed: int = 0, scenes: Sequence[int] = shapes.SCENES, **options) -> None:
    """Adds a data set of built-in clips to DATASETS; `options` are those of shapes.render."""

    def relevance(clips: Sequence[Clip]) -> Bool[np.ndarray, "texts videos"] | None:
        """Which clips show what which caption says; None if captions are not the built-in ones."""
        return shapes.relevance([clip.id for clip in clips], [clip.captions for clip in clips], seed, scenes)

    @register(name, relevance=relevance)
    def read_shapes(data: Path, *_: Path | None) -> list[Clip]:
        """The clips, rendered into DATA/NAME if they are not there (shapes.py). Raises DataError."""
        folder = data / name
        try:
            shapes.render(folder, seed, scenes=scenes, **options)
        except (OSError, RuntimeError) as error:
            raise DataError(str(error)) from None
        return read_csv(folder / "clips.csv", folder / "clips")


register_shapes("shapes")
for _name, _made in shapes.TEST_SETS.items():
    register_shapes(_name, **_made)


@register("csv")
def read_own(data: Path, annotations: Path | None = None, videos: Path | None = None) -> list[Clip]:
    """Your own data: `read_csv`. Raises DataError if a path is not given."""
    if annotations is None or videos is None:
        raise DataError("--dataset csv needs --annotations FILE (video,caption[,split]) and --videos DIR.")
    return read_csv(annotations, videos)


def read_csv(annotations: Path, videos: Path) -> list[Clip]:
    """Clips of a CSV file with columns video,caption[,split][,start,end], or a JSONL file with these keys.

    Rows of the same file and window (start, end: seconds) are captions of one clip, under whatever names. In
    JSONL, a caption may be a list of captions. videos: the folder of videos or pictures. Without splits, a
    hash of the videos' names decides (80/10/10). Raises DataError for a missing file or column, for what is
    no caption, split or time, and if two splits share seconds of a file."""
    if not annotations.is_file():
        raise DataError(
            f"{annotations} not found: give a CSV or JSONL file of video,caption by --annotations."
        )
    if not videos.is_dir():
        raise DataError(f"{videos} is not a folder: give the folder of video files with --videos.")
    files = Files(videos)
    clips = _gather(read_own_rows(annotations, lambda text: like_name(text) or files.is_video(text)), files)
    if clips[0].split:
        _check_overlaps(clips, annotations)
        return clips
    names = {clip.path.name for clip in clips}  # all windows of a video are in the same split
    tenth = max(1, len(names) // 10)
    splits = dict.fromkeys(held_out(names, 2 * tenth), "val") | dict.fromkeys(held_out(names, tenth), "test")
    split = [splits.get(clip.path.name, "train") for clip in clips]
    return [replace(clip, split=name, held_out=name == "val") for clip, name in zip(clips, split)]


def _gather(rows: Sequence[Row], files: Files) -> list[Clip]:
    """The clips of your own rows, each with all its captions."""
    has_splits = any(row.split for row in rows)
    places: dict[str, tuple[Path, object]] = {}  # of each name: its path, and what identifies the file
    paths: dict[object, Path] = {}  # of each file: its first path
    clips: dict[tuple, Clip] = {}
    captions: dict[tuple, list[str]] = {}
    for row in rows:
        if row.name not in places:
            places[row.name] = _place(row, files)
        path, file = places[row.name]
        key = (file, row.start, row.end)
        if key not in clips:
            first = paths.setdefault(file, path)
            clips[key] = Clip(row.id, first, (), row.split, row.start, row.end)
        clip = clips[key]
        if has_splits and not row.split:
            raise DataError(f"{row.where}: the split of {row.name} is ''; it must be train, val or test.")
        if clip.split != row.split:
            also = f", also as {clip.id}" if clip.id != row.id else ""
            raise DataError(f"{row.where}: {row.id} is in two splits{also}; put all its rows in one.")
        if path.suffix.lower() in PICTURE_SUFFIXES and row.id != row.name:
            raise DataError(f"{row.where}: {row.name} is a picture, so leave start and end empty.")
        captions.setdefault(key, []).extend(row.captions)
    return [replace(clip, captions=tuple(captions[key])) for key, clip in clips.items()]


def _place(row: Row, files: Files) -> tuple[Path, object]:
    """The path of a row's video, and what identifies the file: links to a file have its identity."""
    try:
        path = files.video(row.name)
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from None
    try:
        stat = path.stat()
    except OSError:  # there is no such file
        return path, os.path.normpath(path)
    return path, (stat.st_dev, stat.st_ino) if stat.st_ino else str(path.resolve())


def _check_overlaps(clips: Sequence[Clip], annotations: Path) -> None:
    """Raises DataError if two splits share seconds of a file."""
    latest: dict[Path, dict[str, Clip]] = {}  # of each file and split, the clip that ends last so far
    for clip in sorted(clips, key=lambda clip: clip.start):
        of_file = latest.setdefault(clip.path, {})
        for other in of_file.values():
            if other.split != clip.split and _end(other) > clip.start:
                both = f"{other.id} ({other.split}) and {clip.id} ({clip.split}) are parts of one video"
                raise DataError(f"{annotations}: {both} that overlap; put them in one split.")
        of_file[clip.split] = max(of_file.get(clip.split, clip), clip, key=_end)


def _end(clip: Clip) -> float:
    return math.inf if clip.end is None else clip.end


# ---- public data sets


def _captions(files: Files, captions: dict, name: str) -> tuple[str, ...]:
    """The captions of a clip; none if it has no entry. Raises DataError for what is no list of texts."""
    found = captions.get(name, ())
    wrong = [found] if not isinstance(found, list | tuple) else [c for c in found if not isinstance(c, str)]
    if wrong:
        what = f"have {shown(wrong[0])} for {name}, not a list of captions"
        raise DataError(f"the annotations below {files.annotations} {what}: correct it.")
    return tuple(found)


@register(
    "msrvtt",
    needs=("MSRVTT_data.json", "MSRVTT_train.9k.csv or MSRVTT_train.7k.csv", "MSRVTT_JSFUSION_test.csv"),
    also="the videos video0.mp4 to video9999.mp4: msrvtt_data.zip of github.com/ArrowLuo/CLIP4Clip's "
    "releases and MSRVTT.zip of github.com/m-bain/frozen-in-time",
)
def read_msrvtt(files: Files, train: str = "9k") -> Iterator[Clip]:
    """MSR-VTT. train 9k, 7k: these training lists and the 1k-A test split, one caption a clip.

    full: the official splits, 20 captions a clip. Validation of 9k and 7k: the official validation clips in
    the training list (497 of 9k), or a held-out part of it if the JSON has no official splits; published
    numbers train on the whole list (--val none)."""
    content = files.json("MSRVTT_data.json")
    captions = grouped((sentence["video_id"], sentence["caption"]) for sentence in content["sentences"])
    official = {video["video_id"]: video.get("split", "") for video in content.get("videos", [])}
    official = {name: split.replace("validate", "val") for name, split in official.items()}
    if train == "full":
        splits = {name: official.get(name, "") for name in captions}
    else:
        names = [row["video_id"] for _, row in files.rows(f"MSRVTT_train.{train}.csv", "video_id")]
        val = {name for name in names if official.get(name) == "val"} or _validation(names)
        splits = {name: "val" if name in val else "train" for name in names}
        for _, row in files.rows("MSRVTT_JSFUSION_test.csv", "video_id", "sentence"):
            splits[row["video_id"]], captions[row["video_id"]] = "test", [row["sentence"]]
    for name, split in splits.items():
        held_out = split == "val" and train != "full"
        path = files.video(f"{name}.mp4")
        yield Clip(name, path, _captions(files, captions, name), split, held_out=held_out)


@register("msrvtt-7k", like="msrvtt")
def read_msrvtt_7k(files: Files) -> Iterator[Clip]:
    """MSR-VTT with the training list 7k."""
    return read_msrvtt(files, train="7k")


@register("msrvtt-full", like="msrvtt")
def read_msrvtt_full(files: Files) -> Iterator[Clip]:
    """MSR-VTT with its official splits."""
    return read_msrvtt(files, train="full")


@register(
    "lsmdc",
    needs=("LSMDC16_annos_training.csv", "LSMDC16_annos_val.csv", "LSMDC16_challenge_1000_publictect.csv"),
    also="the .avi clips, with a signed licence: sites.google.com/site/describingmovies/download",
)
def read_lsmdc(files: Files) -> Iterator[Clip]:
    """LSMDC. Files are separated by tabs, without header or quoting; a clip has a line for each caption."""
    for split, name in zip(SPLITS, DATASETS["lsmdc"].needs):
        sentences = []
        for number, line in enumerate(files.lines(name), start=1):
            if line.startswith('"'):  # some copies quote the whole line
                line = line[1:].removesuffix('"').replace('""', '"')
            fields = line.split("\t")
            if len(fields) not in (6, 7):  # in one variant the seventh is a paraphrase
                where = f"{files.annotation(name)}, line {number}"
                raise DataError(f"{where}: {len(fields)} tab-separated fields, not 6; get the file again.")
            sentences.append((fields[0], fields[5]))
        for clip, captions in grouped(sentences).items():
            movie = clip.split(".")[0][:-3]  # the id is MOVIE_HH.MM.SS.mmm-HH.MM.SS.mmm
            yield Clip(clip, files.video(f"{clip}.avi", folder=movie), tuple(captions), split)


@register(
    "didemo",
    needs=("train_data.json", "val_data.json", "test_data.json"),
    also="the Flickr videos (github.com/LisaAnne/LocalizingMoments), and for the split of retrieval papers "
    "train_list.txt, val_list.txt, test_list.txt (github.com/albanie/collaborative-experts)",
)
def read_didemo(files: Files) -> Iterator[Clip]:
    """DiDeMo, paragraph retrieval: all descriptions of a video, joined; the first 30 s, which were annotated.

    The optional {split}_list.txt name the videos of retrieval papers (test: 1,004 of 1,037)."""
    for split in SPLITS:
        items = files.json(f"{split}_data.json")
        descriptions = grouped((item["video"], item["description"]) for item in items)
        if files.has(f"{split}_list.txt"):
            names = files.names(f"{split}_list.txt")
        else:
            names = list(descriptions)
            what = f"all {len(names)} videos of {split}_data.json are used, more than in retrieval papers"
            print(f"note: {files.annotations} has no {split}_list.txt: {what}.", file=sys.stderr)
        for name in names:
            yield Clip(name, files.video(name), (" ".join(descriptions.get(name, ())),), split, 0.0, 30.0)


@register(
    "charades",
    needs=("Charades_v1_train.csv", "Charades_v1_test.csv"),
    also="the videos of Charades_v1_480 (prior.allenai.org/projects/charades)",
)
def read_charades(files: Files) -> Iterator[Clip]:
    """Charades: the caption of a video is its script. Validation: a held-out part of the training videos."""
    train, test = (files.rows(name, "id", "script") for name in DATASETS["charades"].needs)
    val = _validation([row["id"] for _, row in train])
    for split, rows in (("train", train), ("test", test)):
        for number, row in rows:
            name = row["id"]  # a string, even if it looks like a number
            if not re.fullmatch("[A-Z0-9]{5}", name):
                where = f"{files.annotation(f'Charades_v1_{split}.csv')}, row {number}"
                why = "a spreadsheet may have changed the file: unpack it again"
                raise DataError(f"{where}: {name!r} is not a video id (5 letters and digits); {why}.")
            path, held_out = files.video(f"{name}.mp4"), name in val
            yield Clip(name, path, (row["script"],), "val" if held_out else split, held_out=held_out)


@register(
    "vatex",
    needs=("vatex_training_v1.0.json", "vatex_validation_v1.0.json"),
    also="the YouTube clips (eric-xw.github.io/vatex-website), and for the split of retrieval papers HGR's "
    "val_list.txt and test_list.txt",
)
def read_vatex(files: Files) -> Iterator[Clip]:
    """VATEX, English, 10 captions a clip. Validation and test are halves of the official validation set.

    {val,test}_list.txt (HGR's) name the halves; without them the halves are our own. A video is `<id>.mp4`, a
    clip of 10 s, or `<first 11 characters>.mp4`, the whole YouTube video; the rest of the id is a window."""
    train, rest = (
        {item["videoID"]: item["enCap"] for item in files.json(name)} for name in DATASETS["vatex"].needs
    )
    if files.has("test_list.txt") and files.has("val_list.txt"):
        halves = {name: split for split in ("val", "test") for name in files.names(f"{split}_list.txt")}
    else:
        test = held_out(rest, len(rest) // 2)
        halves = {name: "test" if name in test else "val" for name in rest}
        what = "has no val_list.txt and test_list.txt (HGR's), so numbers do not compare with published ones"
        print(f"note: {files.annotations} {what}.", file=sys.stderr)
    captions = train | rest
    for name, split in (dict.fromkeys(train, "train") | halves).items():
        path, whole, window = files.video(f"{name}.mp4"), files.video(f"{name[:11]}.mp4"), (0.0, None)
        if not path.is_file() and whole.is_file():
            path, window = whole, tuple(float(seconds) for seconds in name[12:].split("_"))
        yield Clip(name, path, _captions(files, captions, name), split, *window)


@register(
    "msvd",
    needs=("captions_msvd.json or raw-captions.pkl", "train_list.txt", "val_list.txt", "test_list.txt"),
    also="the .avi clips (cs.utexas.edu/users/ml/clamp/videoDescription); the lists are in msvd_data.zip of "
    "github.com/ArrowLuo/CLIP4Clip's releases",
)
def read_msvd(files: Files) -> Iterator[Clip]:
    """MSVD, about 41 captions a clip: a JSON of {id: [sentence]}, or a pickle of {id: [[word]]}."""
    if files.has("captions_msvd.json") or not files.has("raw-captions.pkl"):
        captions = files.json("captions_msvd.json")
    else:
        pickled = _plain_pickle(files.annotation("raw-captions.pkl"))
        captions = {name: [" ".join(words) for words in sentences] for name, sentences in pickled.items()}
    for split in SPLITS:
        for name in files.names(f"{split}_list.txt"):
            yield Clip(name, files.video(f"{name}.avi"), _captions(files, captions, name), split)


def _plain_pickle(path: Path):
    """The content of a pickle of dicts, lists and strings. Raises DataError for one that would run code."""

    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    try:
        with path.open("rb") as file:
            return Plain(file).load()
    except Exception as error:  # a damaged pickle raises many kinds
        raise DataError(f"{path} is not a plain pickle of captions ({error}): download it again.") from None
