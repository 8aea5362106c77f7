"""From clips to batches ("Experimental Settings"): CLIP's preprocessing, the batches of an epoch, the loader.

    python data.py check --dataset msrvtt        # reports what is there, and whether training can start
    python data.py cache --dataset msrvtt        # decodes every clip once, before training

Annotation files are read in engine/datasets.py, videos in engine/frames.py. Wrong input raises DataError.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from engine.backbone import count_tokens, tokenize
from engine.datasets import DATASETS, SPLITS, Clip, cache_folder, find_dataset, open_files, read_clips
from engine.datasets import of_split as of_split  # "as": a re-export, used as data.of_split
from engine.datasets import read_csv as read_csv
from engine.distributed import ignore_signals, loaded
from engine.ffmpeg import LIMITS, Limits, set_limits
from engine.files import PICTURE_SUFFIXES, DataError
from engine.files import stem as stem
from engine.frames import CHOICES, FrameCache, count_packets, decode_frames, in_parallel
from engine.frames import resize as resize
from engine.frames import segment_midpoints as segment_midpoints
from engine.parts import own_part
from engine.uneven import deal_batches

# ---- CLIP's preprocessing; engine.frames.resize comes first

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
STD = (0.26862954, 0.26130258, 0.27577711)


def center_crop(
    frames: UInt8[Tensor, "frames 3 height width"], size: int
) -> UInt8[Tensor, "frames 3 size size"]:
    """The middle square of frames, with torchvision's rounding."""
    top, left = (round((side - size) / 2) for side in frames.shape[-2:])
    return frames[..., top : top + size, left : left + size]


def augment(
    frames: UInt8[Tensor, "frames 3 height width"], size: int, generator: torch.Generator
) -> UInt8[Tensor, "frames 3 size size"]:
    """One random crop and horizontal flip for all frames of a clip.

    Like torchvision's RandomResizedCrop, scale (0.5, 1), ratio (3/4, 4/3), but drawn from a generator."""
    height, width = frames.shape[-2:]
    crop_h = crop_w = min(height, width)  # if none of ten draws fits
    for area, ratio in torch.rand(10, 2, generator=generator).tolist():
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
    """(x / 255 - mean) / std, CLIP's input. Done on the device, so that bytes are transferred, not floats."""
    mean, std = _mean_and_std(images.device)
    return (images / 255 - mean) / std


@functools.cache  # a copy to the GPU at every step would make it wait
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(MEAN, device=device).view(3, 1, 1), torch.tensor(STD, device=device).view(3, 1, 1)


# ---- batches

Images = UInt8[Tensor, "frames 3 size size"] | Float[Tensor, "frames dim"]  # of one clip, or their features
Batch = list[tuple[int, int]]  # numbers of (clip, caption)
Seeds = tuple[int, int] | None  # (seed, epoch)
Tokens = Int[Tensor, " tokens"] | Float[Tensor, " dim"]  # of one caption, or its features


def epoch_batches(clips: Sequence[Clip], batch_size: int, seed: int, epoch: int) -> list[Batch]:
    """The batches of one epoch as (clip, caption) numbers: no caption twice, and no clip twice in a batch.

    Two captions of a clip in one batch would be false negatives of each other. So an epoch has rounds: each
    takes the next caption of every clip, and drops a smaller batch at its end unless it is the only one. For
    unequal numbers of captions, see `deal_batches`. The order is random, by (seed, epoch) alone."""
    rng = np.random.default_rng([seed, epoch])
    order = [rng.permutation(len(clip.captions)) for clip in clips]
    if len({len(captions) for captions in order}) > 1:
        return deal_batches(order, batch_size, rng)
    batches = []
    for turn in range(len(order[0])):
        pairs = [(int(c), int(order[c][turn])) for c in rng.permutation(len(clips))]
        used = len(pairs) - len(pairs) % batch_size or len(pairs)
        batches += [pairs[k : k + batch_size] for k in range(0, used, batch_size)]
    return batches


class ClipDataset(torch.utils.data.Dataset):
    """Items are (images, tokens): uint8 (frames, 3, size, size) of a clip, and the tokens of one caption.

    dataset[clip, caption] holds the midpoints of the segments and the middle square of each frame.
    augmentation=(seed, epoch): a random crop and flip. sampling=(seed, epoch): a random one of each segment's
    cached frames. Both depend on seed, epoch, clip and caption alone, not on workers or the loading order.
    features (videos, frames, dim): if set, items hold a clip's features in place of its images.
    tokens: one tensor for each clip; it may hold features of the captions in their place."""

    features: Float[Tensor, "videos frames dim"] | None = None
    sampling: Seeds = None

    def __init__(
        self, clips: Sequence[Clip], cache: FrameCache, context_length: int = 77, augmentation: Seeds = None
    ):
        self.clips, self.cache, self.length, self.augmentation = clips, cache, context_length, augmentation

    @functools.cached_property
    def tokens(self) -> Sequence[Tensor]:
        captions = [caption for clip in self.clips for caption in clip.captions]
        return tokenize(captions, self.length).split([len(clip.captions) for clip in self.clips])

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Images, Tokens]:
        clip, caption = index if isinstance(index, tuple) else (index, 0)
        if self.features is not None:
            return self.features[clip], self.tokens[clip][caption]

        def generator(seed_and_epoch: tuple[int, int]) -> torch.Generator:
            seed = np.random.SeedSequence([*seed_and_epoch, clip, caption]).generate_state(1)[0]
            return torch.Generator().manual_seed(int(seed))

        frames = self.cache.frames(self.clips[clip], generator(self.sampling) if self.sampling else None)
        images = torch.from_numpy(frames).permute(0, 3, 1, 2)
        if self.augmentation is None:
            images = center_crop(images, self.cache.size)
        else:
            images = augment(images, self.cache.size, generator(self.augmentation))
        return images.contiguous(), self.tokens[clip][caption]


def batches(
    dataset: ClipDataset,
    indices: list[Batch] | list[list[int]],
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[tuple[UInt8[Tensor, "videos frames 3 size size"], Int[Tensor, "texts tokens"]]]:
    """Loads the given batches in order; `workers` processes load them in advance. Raises DataError."""
    options = dict(batch_size=None, num_workers=workers, pin_memory=pin_memory, worker_init_fn=ignore_signals)
    for batch in loaded(torch.utils.data.DataLoader(_Batches(dataset, indices), **options)):
        if isinstance(batch, DataError):
            raise batch
        yield batch


@dataclass(frozen=True)
class _Batches(torch.utils.data.Dataset):
    """Items are whole batches. Returns a DataError, not raises it, so that DataLoader adds no traceback."""

    dataset: ClipDataset
    indices: list

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int):
        try:
            return torch.utils.data.default_collate([self.dataset[index] for index in self.indices[number]])
        except DataError as error:
            return error


# ---- command line


def check(
    dataset: str = "shapes",
    data: Path = Path("data"),
    annotations: Path | None = None,
    videos: Path | None = None,
    read: bool = True,
    limits: Limits = LIMITS,
) -> int:
    """Reports what of a data set is there, and the first problem. Exit code 0: training can start.

    Args:
        dataset: DATASETS
        data: folder of the data sets
        annotations: for csv: the file; for others: the folder, if it is not DATA/DATASET
        videos: the folder of videos, if it is another one
        read: open every video (otherwise only look whether it exists)
    """
    set_limits(limits.max_pixels, limits.time_limit)
    if needs := find_dataset(dataset).needs:
        files = open_files(dataset, data, annotations, videos)
        for name in needs:
            found = [str(files.annotation(one)) for one in name.split(" or ") if files.has(one)]
            print(f"{name}: {', '.join(found) or 'not found'}")
    clips = read_clips(dataset, data, annotations, videos)
    problems = in_parallel(functools.partial(_problem, read=read), clips, "opening videos")
    found, captions = sum(clip.path.is_file() for clip in clips), sum(len(clip.captions) for clip in clips)
    print(f"{dataset}: {found} of {len(clips)} videos found, {captions} captions\n")
    row = "{:<6} {:>8} {:>8} {:>11} {:>9} {:>15} {:>8} {:>8}".format
    print(row("split", "clips", "missing", "unreadable", "captions", "tokens: median", "longest", "over 77"))
    usable = {}
    for split in SPLITS:
        own = [(clip, problem) for clip, problem in zip(clips, problems) if clip.split == split]
        missing = sum("not found" in problem for _, problem in own if problem)
        unreadable = sum(problem is not None for _, problem in own) - missing
        usable[split] = len(own) - missing - unreadable
        captions = [caption for clip, _ in own for caption in clip.captions]
        tokens = np.array([count_tokens(caption) for caption in captions] or [0])
        numbers = f"{np.median(tokens):.0f}", tokens.max(), (tokens > 77).sum()
        print(row(split, len(own), missing, unreadable, len(captions), *numbers))
    first = next((problem for problem in problems if problem), None)
    empty = next((split for split in ("train", "val") if not usable[split]), None)
    print(f"\nfirst problem: {first}" if first else "")
    cannot = f"training cannot start: no clip of split {empty} can be read."
    skips = ": it skips and lists such clips; evaluate.py needs --allow-missing" if first else ""
    print(cannot if empty else f"training can start{skips}.")
    return 1 if empty else 0


def _problem(clip: Clip, read: bool) -> str | None:
    """Why a clip's video cannot be used, or None. read: open it (its frames are not decoded)."""
    if not clip.path.is_file():
        return f"{clip.path} not found: add the file, or train without it."
    if not read:
        return None
    try:
        if clip.path.suffix.lower() in PICTURE_SUFFIXES:
            decode_frames(clip.path, 1)
        elif not count_packets(clip.path):
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
    part: str | None = None,
    limits: Limits = LIMITS,
) -> int:
    """Decodes every clip once into DATA/cache; continues after a stop. Exit code 1: some clips failed.

    Args:
        dataset: DATASETS
        data: folder of the data sets and of the cache
        annotations: for csv: the file; for others: the folder, if it is not DATA/DATASET
        videos: the folder of videos, if it is another one
        num_frames: frames per clip
        size: pixels of the shorter side; default: 224 (ViT-B), or 64 (tiny) for the built-in clips
        sampling: random: keep five frames of each segment, for train.py --sampling random
        features: also keep CLIP's features of the frames, for train.py --freeze; the size is then the model's
        arch: the CLIP that computes them: ViT-B/32, ViT-B/16, tiny, or a file of weights
        weights: file of CLIP weights, for machines without network
        device: auto, cpu, cuda: where features are computed
        part: 3/16: only the third of 16 parts; default: as Slurm or torchrun say, else all
    """
    set_limits(limits.max_pixels, limits.time_limit)
    if features:
        flags = dict(dataset=dataset, data=data, annotations=annotations, videos=videos, arch=arch)
        flags |= dict(num_frames=num_frames, sampling=sampling, weights=weights, device=device, part=part)
        return _cache_features(flags)
    size = size or (64 if dataset == "shapes" else 224)
    clips = own_part(read_clips(dataset, data, annotations, videos), part)
    frames = FrameCache(cache_folder(dataset, data, videos), num_frames, size, CHOICES[sampling])
    return report(frames, clips, frames.fill(clips))


def _cache_features(flags: dict) -> int:
    """Runs engine.features in a new process, as this module imports no model. Returns its exit code."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not None]
    paths = filter(None, [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-P", "-m", "engine.features", *given], env=environment).returncode


def report(frames: FrameCache, clips: Sequence[Clip], failures: dict[str, str]) -> int:
    """Prints the size of a cache and the first 20 failures. Returns the exit code: 1 if there are any."""
    count = len(clips) - len(failures)
    total = sum(path.stat().st_size for path in frames.folder.rglob("*") if path.is_file())
    sizes = f"{total / 2**20:.0f} MiB, {total / 2**10 / max(1, count):.0f} KiB a clip"
    print(f"{count} of {len(clips)} clips are in {frames.folder}: {sizes}.")
    for reason in list(failures.values())[:20]:
        print(f"failed: {reason}")
    if len(failures) > 20:
        print(f"and {len(failures) - 20} more.")
    return 1 if failures else 0


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. A mistake in the input ends it with one sentence and exit code 1."""
    import tyro

    for command in (commands := {"check": check, "cache": cache}).values():
        command.__doc__ = command.__doc__.replace("DATASETS", ", ".join(DATASETS))
    try:
        cli = functools.partial(tyro.extras.subcommand_cli_from_dict, config=(tyro.conf.OmitArgPrefixes,))
        sys.exit(cli(commands, args=arguments, description=__doc__))
    except ValueError as error:  # DataError
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command continues from here.")


if __name__ == "__main__":
    main()
