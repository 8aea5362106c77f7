"""A cache of decoded frames on disk. The frames of a video come from engine/video.py."""

import functools
import hashlib
import io
import os
import struct
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from tqdm.auto import tqdm

import shapes
from engine.datasets import Clip
from engine.ffmpeg import set_limits as set_limits
from engine.ffmpeg import stopped
from engine.files import DataError, remove_leftovers, write_atomic, writing
from engine.video import count_packets as count_packets
from engine.video import decode_frames
from engine.video import duration as duration
from engine.video import resize as resize
from engine.video import segment_midpoints as segment_midpoints

CHOICES = {"uniform": 1, "random": 5}  # cached frames per segment, by --sampling
MEMORY = 2**29  # bytes that decoding a clip takes, at most; larger frames are decoded one clip at a time
DAMAGED = (OSError, ValueError, LookupError, EOFError, RuntimeError)  # raised for a damaged zip file
DAMAGED = (*DAMAGED, zipfile.BadZipFile, zlib.error, struct.error)

ENDS = 2**16  # bytes of a file's head and of its tail that are hashed
RULES = 2  # raise it when other frames are decoded from the same file: caches are then made anew

Item, Result = TypeVar("Item"), TypeVar("Result")


# ---- cache


class FrameCache:
    """Decoded frames on disk: one zip of JPEGs a clip (quality 95, full colour), shorter side `size` pixels.

    Each of a clip's `num_frames` segments has `choices` frames (an odd number), evenly spaced. The middle one
    is the segment's midpoint, so one file serves uniform and random sampling. A file records its `source`: if
    the video changes, it is decoded again; if the video is removed or copied, the file remains valid. JPEG
    changes pixels by 1 to 2 of 255 on average; raw frames would be 7 times larger."""

    QUALITY = 95

    def __init__(self, folder: Path, num_frames: int, size: int, choices: int = 1):
        assert choices % 2 == 1, "the middle choice is the midpoint"
        self.num_frames, self.size, self.choices = num_frames, size, choices
        count = f"{num_frames}x{choices}" if choices > 1 else f"{num_frames}"
        self.folder = folder / f"{count}frames-{size}px-jpeg{self.QUALITY}"

    def path(self, clip: Clip) -> Path:
        """The file of a clip's frames, whether it exists or not."""
        return self.folder / f"{file_name(clip)}.zip"

    def _open(self, clip: Clip) -> zipfile.ZipFile | None:
        """The file of a clip's frames if it is complete and current."""
        try:
            file = zipfile.ZipFile(self.path(clip))
        except DAMAGED:
            return None
        return file if is_current(file.comment, clip) else None

    def frames(
        self, clip: Clip, generator: torch.Generator | None = None
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        """The frames of a clip, decoded into the cache if they are not there or the file is damaged.

        Without a generator, the segments' midpoints; with one, a random choice in each. Raises DataError."""
        picks = torch.full((self.num_frames,), self.choices // 2)
        if generator is not None:
            picks = torch.randint(self.choices, (self.num_frames,), generator=generator)
        numbers = [segment * self.choices + pick for segment, pick in enumerate(picks.tolist())]
        frames = self._read(clip, numbers)
        if frames is None:
            self._write(clip)
            frames = self._read(clip, numbers)
        if frames is None:
            raise DataError(f"{self.path(clip)} cannot be read back: check that disk.")
        return frames

    def _read(self, clip: Clip, numbers: list[int]) -> UInt8[np.ndarray, "frames height width 3"] | None:
        """These frames from the cache; None if they are not there, of another source, or damaged."""
        if (file := self._open(clip)) is None:
            return None
        try:
            with file:
                pictures = [Image.open(io.BytesIO(file.read(f"{number:03d}.jpg"))) for number in numbers]
            return np.stack([np.asarray(picture) for picture in pictures])
        except DAMAGED:
            return None

    def _write(self, clip: Clip, frames: Sequence[np.ndarray] | None = None) -> None:
        """Decodes a clip into the cache. frames: all frames of its video, if they are known already."""
        made_from = source(clip)  # before decoding, in case the video changes meanwhile
        content = io.BytesIO()
        count = self.num_frames * self.choices
        if frames is None:
            frames = decode_frames(clip.path, count, clip.start, clip.end, self.size)
        else:
            frames = [resize(frames[number], self.size) for number in segment_midpoints(len(frames), count)]
        with zipfile.ZipFile(content, "w") as file:
            for number, frame in enumerate(stack(frames)):
                picture = io.BytesIO()
                Image.fromarray(frame).save(picture, "JPEG", quality=self.QUALITY, subsampling=0)
                file.writestr(zipfile.ZipInfo(f"{number:03d}.jpg"), picture.getvalue())  # without a date
            file.comment = made_from
        save(self.path(clip), content.getvalue())

    def fill(self, clips: Sequence[Clip]) -> dict[str, str]:
        """Decodes the clips that are not in the cache, on all cores. Returns {clip id: why} of failures."""
        remove_leftovers(self.folder)
        todo = [clip for clip in clips if self._open(clip) is None]
        whole = [c for c in todo if shapes.is_rendered(c.path) and c.start == 0 and c.end is None]
        if len(whole) > 1:
            parts = [whole[k : k + 25] for k in range(0, len(whole), 25)]
            in_parallel(self._write_built_in, parts, "decoding, 25 clips at a time")
            todo = [clip for clip in todo if self._open(clip) is None]
        reasons = in_parallel(self._try, todo, "decoding frames")
        return {clip.id: reason for clip, reason in zip(todo, reasons) if reason}

    def _write_built_in(self, clips: Sequence[Clip]) -> None:
        """Decodes many built-in clips at once. Leaves them to be decoded one by one if they were changed."""
        try:
            every = shapes.decode([clip.path for clip in clips])
        except ValueError:
            return
        for clip, frames in zip(clips, every):
            self._write(clip, frames)

    def _try(self, clip: Clip) -> str | None:
        try:
            self._write(clip)
        except DataError as error:
            return str(error)


def stack(frames: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> UInt8[np.ndarray, "frames height width 3"]:
    """The frames of a clip as one array. If their sizes differ, the square in the middle of each."""
    side = min(min(frame.shape[:2]) for frame in frames)
    if len({frame.shape for frame in frames}) > 1:
        corners = [((frame.shape[0] - side) // 2, (frame.shape[1] - side) // 2) for frame in frames]
        frames = [frame[y : y + side, x : x + side] for frame, (y, x) in zip(frames, corners)]
    return np.stack(frames)


def save(path: Path, content: bytes) -> None:
    """Writes a file of a cache atomically. Raises DataError if it cannot be written."""
    advice = "make room or name another folder with --data; what is written so far is kept."
    with writing(path, DataError, advice):
        write_atomic(path, content, sync=False)  # damage is noticed, and mended


def file_name(clip: Clip) -> str:
    """A clip's id as a file name: %XX except for letters, digits and _.-~; a long one ends in a hash."""
    name = urllib.parse.quote(clip.id, safe="")
    return name if len(name) <= 150 else f"{name[:100]}~{hashlib.sha256(clip.id.encode()).hexdigest()[:16]}"


def source(clip: Clip) -> bytes:
    """What a clip's frames depend on: id, window, the file's size, time of change and ends, RULES.

    Empty without the video."""
    try:
        size, time, rules = _stamp(clip)
        return b"%b%b %b %b %b" % (_clip_and_window(clip), size, time, _ends(clip), rules)
    except OSError:
        return b""


def is_current(made_from: bytes, clip: Clip) -> bool:
    """Whether cached data with this `source` is valid for a clip. A missing video counts as unchanged.

    If the time of change alone differs, as after a copy, the hash of the file's ends decides; older caches
    have none."""
    start = _clip_and_window(clip)
    if not made_from.startswith(start):
        return False
    try:
        now = _stamp(clip)
    except OSError:
        return True
    recorded = made_from.removeprefix(start).split()  # size, time, hash (not in older caches), RULES
    if recorded[:2] + recorded[-1:] == now:
        return True
    return recorded[:1] + recorded[2:] == [now[0], _ends(clip), now[2]]


def _clip_and_window(clip: Clip) -> bytes:
    return f"{clip.id} {clip.start:g} {clip.end} ".encode()


def _stamp(clip: Clip) -> list[bytes]:
    stat = clip.path.stat()
    return [str(part).encode() for part in (stat.st_size, stat.st_mtime_ns, RULES)]


def _ends(clip: Clip) -> bytes:
    """A hash of the first and the last 64 KiB of a file; empty if it cannot be read."""
    stat = clip.path.stat()
    return _hash_of_ends(clip.path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(2**17)  # each item of each epoch asks
def _hash_of_ends(path: Path, size: int, time: int) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(ENDS)
            file.seek(max(len(head), size - ENDS))
            return hashlib.sha256(head + file.read(ENDS)).hexdigest()[:16].encode()
    except OSError:
        return b""


def in_parallel(work: Callable[[Item], Result], items: Sequence[Item], what: str) -> list[Result]:
    """[work(item) for each item] in threads, with a progress bar named `what`.

    An interruption ends each running ffmpeg."""
    pool = ThreadPoolExecutor(_threads())
    try:
        results = pool.map(work, items)
        return list(tqdm(results, total=len(items), desc=what, unit=" clips", disable=len(items) < 50))
    except BaseException:
        with stopped():
            pool.shutdown(cancel_futures=True)
        raise
    finally:
        pool.shutdown()


def _threads() -> int:
    """The number of clips to decode at once: one for each core, fewer if memory is short."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = [cores * MEMORY]
    if hasattr(os, "sysconf"):
        memory.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        memory.append(int(text))
    return max(1, min(memory) // MEMORY)
