"""From annotation files and video files to batches of frames and tokens ("Experimental Settings": data sets, 12 frames a clip, 224 px).

One record a clip (`Clip`), one reader a data set (`read_clips`), exact frames through ffmpeg (`decode_frames`), CLIP's preprocessing
(`resize`, `center_crop`, `normalise`), a cache of decoded frames so that epochs do not decode again (`FrameCache`), and a loader whose
batches depend on nothing but the seed and the epoch (`epoch_batches`, `ClipDataset`).

This file knows nothing of models. Anything wrong with the input is a DataError, one sentence that says what to do.
"""

import csv
import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

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


def read_csv(annotations: Path, videos: Path) -> list[Clip]:
    """Your own data: a file `video,caption[,split]`, one caption a line, and the folder that holds the videos (or pictures).

    A video on several lines has several captions. Without a `split` column the clips are cut into train, val and test (80/10/10) by a
    hash of their name: the cut is the same on every machine and does not change when clips are added.
    Raises DataError for a missing file or column, an unknown split, an empty caption, a clip in two splits or a video that is not there."""
    if not annotations.is_file():
        raise DataError(f"{annotations} not found: give a CSV file with columns video,caption[,split] by --annotations.")
    if not videos.is_dir():
        raise DataError(f"{videos} is not a folder: give the folder of video files by --videos.")
    with annotations.open(newline="", encoding="utf-8-sig") as file:
        try:
            rows = list(csv.DictReader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{annotations} cannot be read as UTF-8 CSV ({error}): save it as UTF-8, comma separated.") from None
        header = rows[0].keys() if rows else []
    if not {"video", "caption"} <= set(header):
        found = ", ".join(str(name) for name in header) or "nothing"
        raise DataError(f"{annotations} needs the columns video,caption[,split] in its first line, and at least one row; found: {found}.")

    captions: dict[str, list[str]] = {}
    split: dict[str, str] = {}
    for line, row in enumerate(rows, start=2):
        name, caption = row["video"], (row["caption"] or "").strip()
        if not name or not caption:
            raise DataError(f"{annotations}, row {line}: the {'caption' if name else 'video'} is empty; fill it in or delete the row.")
        captions.setdefault(name, []).append(caption)
        part = split.setdefault(name, row.get("split") or "")
        if part != (row.get("split") or ""):
            raise DataError(f"{annotations}, row {line}: {name} is in two splits; a clip belongs to one.")
    if "split" not in header:
        split = _hashed_split(list(captions))
    unknown = next((name for name, part in split.items() if part not in ("train", "val", "test")), None)
    if unknown is not None:
        raise DataError(f"{annotations}: the split of {unknown} is {split[unknown]!r}; it must be train, val or test.")
    present = {path.name: path for path in videos.iterdir()}
    by_stem = {path.stem: path for path in present.values()}
    paths = {name: present.get(name) or by_stem.get(name) or (videos / name) for name in captions}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(paths)} videos of {annotations} are not in {videos}, the first is {missing[0]}: "
                        "add them or delete their rows.")  # fmt: skip
    return [Clip(name, paths[name], tuple(texts), split[name]) for name, texts in captions.items()]


def _hashed_split(names: list[str]) -> dict[str, str]:
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    tenth = max(1, len(names) // 10)
    return {name: "test" if k < tenth else "val" if k < 2 * tenth else "train" for k, name in enumerate(ordered)}


def read_shapes(folder: Path, what: str = "clips") -> list[Clip]:
    """The built-in clips, rendered into `folder` when they are not there yet (shapes.py).

    what="pictures": the still pictures of one scene that the small CLIP is pretrained on. Raises DataError."""
    try:
        shapes.render(folder)
    except (OSError, RuntimeError) as error:
        raise DataError(str(error)) from None
    return read_csv(folder / f"{what}.csv", folder / what)


# The paper's data sets take a reader each, here: a function that returns a list of Clip. What each needs is known already.
LATER = {
    "msrvtt": "MSRVTT_data.json, MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv and videos/all/*.mp4",
    "lsmdc": "LSMDC16_annos_training.csv, LSMDC16_annos_val.csv, LSMDC16_challenge_1000_publictect.csv and the .avi clips (signed licence)",
    "didemo": "train_data.json, val_data.json, test_data.json and the Flickr videos",
    "charades": "Charades_v1_train.csv, Charades_v1_test.csv and Charades_v1_480/*.mp4",
    "vatex": "vatex_training_v1.0.json, vatex_validation_v1.0.json and the YouTube clips",
    "msvd": "captions_msvd.json, train_list.txt, val_list.txt, test_list.txt and the .avi clips",
}
DATASETS = ("shapes", "csv", *LATER)  # and "pictures", for the tiny CLIP alone


def read_clips(dataset: str, data: Path, annotations: Path | None = None, videos: Path | None = None) -> list[Clip]:
    """All clips of a data set, of every split. `data`: the folder of data sets; `annotations`, `videos`: for "csv".

    Raises DataError where something is missing, saying what to get and where to put it."""
    if dataset in ("shapes", "pictures"):
        return read_shapes(data / "shapes", "clips" if dataset == "shapes" else "pictures")
    if dataset == "csv":
        if annotations is None or videos is None:
            raise DataError("--dataset csv needs --annotations FILE (columns video,caption[,split]) and --videos DIR.")
        return read_csv(annotations, videos)
    if dataset in LATER:
        raise DataError(
            f"--dataset {dataset}: its reader is not written yet; it will read {LATER[dataset]}, from {data / dataset}. "
            "Until then, write your copy's annotations as a CSV of video,caption,split: --dataset csv --annotations FILE --videos DIR."
        )
    raise DataError(f"unknown data set {dataset!r}; choose one of {', '.join(DATASETS)}.")


def of_split(clips: Sequence[Clip], split: str) -> list[Clip]:
    """The clips of one split, in file order. Raises DataError when there is none."""
    chosen = [clip for clip in clips if clip.split == split]
    if not chosen:
        raise DataError(f"no clip has split {split!r}: mark some in the `split` column of the annotations.")
    return chosen


# ----------------------------------------------------------------------------------------------------------- frames out of a video


PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
SHORT_FILE, SHORT_PIPE = 2**18, 2**25  # bytes: files under the first are read whole, up to the second


def segment_midpoints(count: int, num_frames: int) -> list[int]:
    """Frame numbers at the middle of `num_frames` equal segments of a clip of `count` frames; short clips repeat frames."""
    return [(2 * k + 1) * count // (2 * num_frames) for k in range(num_frames)]


def _ffmpeg(path: Path, **options) -> tuple[bytes, str]:
    """What ffmpeg writes for the first real video stream of a file: (its output, its log)."""
    output = ffmpeg.input(f"file:{path}", threads=1).output("pipe:", map="0:v:0", **options).global_args("-nostdin", "-v", "verbose")
    try:
        stdout, log = output.run(cmd=imageio_ffmpeg.get_ffmpeg_exe(), capture_stdout=True, capture_stderr=True)
    except ffmpeg.Error:
        raise DataError(f"{path} holds no readable video (empty, broken or not a video file): replace it or delete its rows.") from None
    log = log.decode(errors="replace")
    if "partial file" in log:
        raise DataError(f"{path} is truncated: its index promises more than the file holds; copy or download it again.")
    return stdout, log


def _pixels(path: Path, **options) -> tuple[list[UInt8[np.ndarray, "height width 3"]], int]:
    """Decoded frames as arrays, and how many frames the decoder found in all."""
    stdout, log = _ffmpeg(path, format="image2pipe", vcodec="ppm", pix_fmt="rgb24", fps_mode="passthrough", **options)
    frames, position = [], 0
    while header := re.compile(rb"P6\s(\d+)\s(\d+)\s255\s").match(stdout, position):
        width, height = int(header[1]), int(header[2])
        if header.end() + width * height * 3 > len(stdout):
            break
        frames.append(np.frombuffer(stdout, np.uint8, width * height * 3, header.end()).reshape(height, width, 3))
        position = header.end() + width * height * 3
    decoded = re.search(r"\(video\):.*?(\d+) frames decoded; (\d+) decode errors", log)
    if decoded and int(decoded[2]):
        raise DataError(f"{path} is damaged: {decoded[2]} of its frames cannot be decoded; copy or download it again.")
    return frames, int(decoded[1]) if decoded else len(frames)


def decode_frames(path: Path, num_frames: int) -> list[UInt8[np.ndarray, "height width 3"]]:
    """`num_frames` frames of a video at the midpoints of equal segments, exact to the frame, rotated as the file says, in its own size.

    Long files take two ffmpeg processes, one that counts packets and one that decodes the chosen frame numbers; short files are read
    whole by one. A picture file counts as a clip of one frame. Raises DataError for a file that is missing, unreadable or damaged."""
    if not path.is_file():
        raise DataError(f"{path} not found: add the file or delete its rows.")
    if path.suffix.lower() in PICTURE_SUFFIXES:
        try:
            return [np.asarray(Image.open(path).convert("RGB"))] * num_frames
        except (UnidentifiedImageError, OSError):
            raise DataError(f"{path} is not a readable picture: replace it or delete its rows.") from None
    if path.stat().st_size < SHORT_FILE:
        frames, count = _pixels(path, fs=SHORT_PIPE)
        if 0 < count == len(frames):
            return [frames[n] for n in segment_midpoints(count, num_frames)]
    packets = re.search(r"\(video\): (\d+) packets read", _ffmpeg(path, vcodec="copy", format="null")[1])
    count = int(packets[1]) if packets else 0
    for _ in range(2):  # a file can hold packets that are never shown (edit lists): then the decoder's count is the true one
        if count == 0:
            break
        numbers = sorted(set(wanted := segment_midpoints(count, num_frames)))
        frames, decoded = _pixels(path, vf="select=" + "+".join(f"eq(n\\,{n})" for n in numbers))
        if decoded == count and len(frames) == len(numbers):
            return [frames[numbers.index(n)] for n in wanted]
        count = decoded
    raise DataError(f"{path} holds no frame that can be decoded: replace it or delete its rows.")


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
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (images / 255 - mean) / std


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


# ------------------------------------------------------------------------------------------------------------------ cache, loader


class FrameCache:
    """Decoded frames on disk, one file a clip: uint8 (frames, height, width, 3), the shorter side already `size` pixels, losslessly.

    A file's name holds a hash of what it was made from (path, bytes, time of change, frames, size), so a changed video is decoded
    again; it is written under another name first, so that one that exists is whole."""

    def __init__(self, folder: Path, num_frames: int, size: int):
        self.folder, self.num_frames, self.size = folder / f"{num_frames}frames-{size}px", num_frames, size

    def path(self, clip: Clip) -> Path:
        """Where the frames of a clip are, or would be."""
        stat = clip.path.stat()
        made_from = f"{clip.path.resolve()} {stat.st_size} {stat.st_mtime_ns} {self.num_frames} {self.size} midpoints"
        return self.folder / f"{hashlib.sha256(made_from.encode()).hexdigest()[:24]}.npy"

    def frames(self, clip: Clip) -> UInt8[np.ndarray, "frames height width 3"]:
        """The frames of a clip: from the cache, else decoded and kept there. Raises DataError."""
        path = self.path(clip)
        if not path.exists():
            frames = np.stack([resize(frame, self.size) for frame in decode_frames(clip.path, self.num_frames)])
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.part")
            with partial.open("wb") as file:
                np.save(file, frames)
            partial.replace(path)
        return np.load(path)

    def fill(self, clips: Sequence[Clip]) -> None:
        """Decodes what is not there yet, on all cores. Raises DataError that counts the clips that failed and names the first."""
        todo = [clip for clip in clips if not (clip.path.exists() and self.path(clip).exists())]
        failures = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for error in tqdm(pool.map(self._try, todo), total=len(todo), desc="decoding frames", unit=" clips", disable=len(todo) < 50):
                failures += [error] if error else []
        if failures:
            more = f" ({len(failures)} of {len(clips)} clips failed; the others are cached.)" if len(failures) > 1 else ""
            raise DataError(f"{failures[0]}{more}")

    def _try(self, clip: Clip) -> DataError | None:
        try:
            self.frames(clip)
        except DataError as error:
            return error


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

    `dataset[clip, caption]` is the plain item; with `augmentation=(seed, epoch)` it is cropped and flipped at random, depending
    on nothing but seed, epoch, clip and caption: not on workers, nor on what was loaded before. With `features` (videos, frames, dim)
    set, an item holds the features of its clip in the place of its images."""

    features: Float[Tensor, "videos frames dim"] | None = None

    def __init__(self, clips: Sequence[Clip], cache: FrameCache, context_length: int = 77, augmentation: tuple[int, int] | None = None):
        self.clips, self.cache, self.augmentation = clips, cache, augmentation
        tokens = tokenize([caption for clip in clips for caption in clip.captions], context_length)
        self.tokens = tokens.split([len(clip.captions) for clip in clips])

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(
        self, index: int | tuple[int, int]
    ) -> tuple[UInt8[Tensor, "frames 3 size size"] | Float[Tensor, "frames dim"], Int[Tensor, " tokens"]]:
        clip, caption = index if isinstance(index, tuple) else (index, 0)
        if self.features is not None:
            return self.features[clip], self.tokens[clip][caption]
        frames = torch.from_numpy(self.cache.frames(self.clips[clip])).permute(0, 3, 1, 2)
        if self.augmentation is None:
            images = center_crop(frames, self.cache.size)
        else:
            entropy = np.random.SeedSequence([*self.augmentation, clip, caption]).generate_state(1)[0]
            images = augment(frames, self.cache.size, torch.Generator().manual_seed(int(entropy)))
        return images.contiguous(), self.tokens[clip][caption]


def batches(
    dataset: ClipDataset, indices: list[list[tuple[int, int]]] | list[list[int]], workers: int = 0, pin_memory: bool = False
) -> Iterator[tuple[UInt8[Tensor, "videos frames 3 size size"], Int[Tensor, "texts tokens"]]]:
    """Loads the given batches in their order, ahead of use in `workers` processes."""
    yield from torch.utils.data.DataLoader(dataset, batch_sampler=indices, num_workers=workers, pin_memory=pin_memory)
