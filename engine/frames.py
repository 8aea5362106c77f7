"""Exact frames of a video file, decoded by ffmpeg, and a cache of them on disk."""

import hashlib
import io
import os
import re
import urllib.parse
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import ffmpeg
import imageio_ffmpeg
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from engine.datasets import Clip
from engine.files import PICTURE_SUFFIXES, DataError, remove_leftovers, write_atomic, writing

SHORT_FILE = 2**18  # bytes: smaller files are decoded whole, in one pass
SHORT_PIPE = 2**25  # bytes of decoded frames at which such a pass stops
CHOICES = {"uniform": 1, "random": 5}  # cached frames per segment, by --sampling

Item, Result = TypeVar("Item"), TypeVar("Result")


# ---- decoding


def segment_midpoints(count: int, num_frames: int) -> list[int]:
    """The frame numbers at the middle of `num_frames` equal segments of a video of `count` frames.

    If there are fewer frames than segments, numbers are repeated."""
    return [(2 * k + 1) * count // (2 * num_frames) for k in range(num_frames)]


def run_ffmpeg(path: Path, window: dict[str, float], **options) -> tuple[bytes, str]:
    """The output and the log of ffmpeg for the first video stream of a file.

    window: {"ss": start, "t": length} in seconds, or empty. options: output options of ffmpeg.
    Raises DataError for a file that is not a video, or is truncated or damaged."""
    try:
        stream = ffmpeg.input(f"file:{path}", threads=1, **window).output("pipe:", map="0:v:0", **options)
        stream = stream.global_args("-nostdin", "-v", "verbose")
        executable = imageio_ffmpeg.get_ffmpeg_exe()
        output, log = stream.run(cmd=executable, capture_stdout=True, capture_stderr=True)
    except ffmpeg.Error:
        what = "holds no readable video (empty, broken or not a video file)"
        raise DataError(f"{path} {what}: replace it or delete its rows.") from None
    except UnicodeEncodeError:
        raise DataError(f"{os.fsencode(path)} is a file name that is not UTF-8: rename the file.") from None
    log = log.decode(errors="replace")
    if "partial file" in log:
        raise DataError(f"{path} is truncated: copy or download it again.")
    if (errors := re.search(r"(\d+) decode errors", log)) and int(errors[1]):
        raise DataError(
            f"{path} is damaged, {errors[1]} frames cannot be decoded: copy or download it again."
        )
    return output, log


def _count(log: str, what: str) -> int:
    """The number of "packets read", "frames decoded" or "frames encoded" in ffmpeg's log, or 0."""
    found = re.search(rf"\(video\):.*?(\d+) {what}", log)
    return int(found[1]) if found else 0


def count_packets(path: Path) -> int:
    """The number of a video's packets, about one a frame. Nothing is decoded. Raises DataError."""
    return _count(run_ffmpeg(path, {}, vcodec="copy", format="null")[1], "packets read")


def _decode(path: Path, window: dict[str, float], **options) -> tuple[list[UInt8[np.ndarray, "h w 3"]], int]:
    """The frames that ffmpeg outputs, and the number of frames that it decoded."""
    options |= dict(format="image2pipe", vcodec="ppm", pix_fmt="rgb24", fps_mode="passthrough")
    output, log = run_ffmpeg(path, window, **options)
    frames, position = [], 0
    while header := re.compile(rb"P6\s(\d+)\s(\d+)\s255\s").match(output, position):
        width, height, start = int(header[1]), int(header[2]), header.end()
        position = start + width * height * 3
        if position > len(output):
            break
        frames.append(np.frombuffer(output, np.uint8, width * height * 3, start).reshape(height, width, 3))
    return frames, _count(log, "frames decoded") or len(frames)


def decode_frames(
    path: Path, num_frames: int, start: float = 0.0, end: float | None = None
) -> list[UInt8[np.ndarray, "height width 3"]]:
    """`num_frames` frames of a video at the midpoints of equal segments, in its own size, rotated as it says.

    The frame numbers are exact. With start and end (seconds), the segments divide the frames shown at
    start <= time < end. A picture is a video of one frame. Raises DataError for a file that is missing,
    unreadable, truncated or damaged, and for a window without frames.

    A long file takes two passes of ffmpeg: one counts the frames, one decodes those that are needed."""
    if not path.is_file():
        raise DataError(f"{path} not found: add the file or delete its rows.")
    if path.suffix.lower() in PICTURE_SUFFIXES:
        try:
            return [np.asarray(Image.open(path).convert("RGB"))] * num_frames
        except (UnidentifiedImageError, OSError):
            raise DataError(f"{path} is not a readable picture: replace it or delete its rows.") from None
    window = ({"ss": start} if start else {}) | ({} if end is None else {"t": end - start})
    if not window and path.stat().st_size < SHORT_FILE:
        frames, count = _decode(path, window, fs=SHORT_PIPE)
        if 0 < count == len(frames):  # else the pass stopped early
            return [frames[n] for n in segment_midpoints(count, num_frames)]
    if window:
        count = _count(run_ffmpeg(path, window, format="null", fps_mode="passthrough")[1], "frames encoded")
    else:
        count = count_packets(path)
    for _ in range(2):  # some packets may never be shown (edit lists); then the decoder has the true count
        if count == 0:
            break
        wanted = segment_midpoints(count, num_frames)
        numbers = sorted(set(wanted))
        frames, decoded = _decode(path, window, vf="select=" + "+".join(f"eq(n\\,{n})" for n in numbers))
        if (window or decoded == count) and len(frames) == len(numbers):
            return [frames[numbers.index(n)] for n in wanted]
        count = decoded
    where = f" from {start:g} s" + (f" to {end:g} s" if end is not None else "") if window else ""
    raise DataError(f"{path} holds no frame{where} that can be decoded: replace it or delete its rows.")


def duration(path: Path) -> float:
    """The length of a video in seconds: the time of its last packet. Nothing is decoded. Raises DataError."""
    log = run_ffmpeg(path, {}, vcodec="copy", format="null")[1]
    times = re.findall(r"time=(\d+):(\d+):([\d.]+)", log)
    if not times:
        raise DataError(f"{path} holds no frame: replace it or delete its rows.")
    hours, minutes, seconds = map(float, times[-1])
    return hours * 3600 + minutes * 60 + seconds


def resize(
    frame: UInt8[np.ndarray, "height width 3"], size: int
) -> UInt8[np.ndarray, "new_height new_width 3"]:
    """The frame with a shorter side of `size` pixels, by Pillow's bicubic filter, as in CLIP."""
    height, width = frame.shape[:2]
    new = (size, size * height // width) if width <= height else (size * width // height, size)
    return np.asarray(Image.fromarray(frame).resize(new, Image.Resampling.BICUBIC))


# ---- cache


class FrameCache:
    """Decoded frames on disk: one zip of JPEGs a clip (quality 95, full colour), shorter side `size` pixels.

    Each of a clip's `num_frames` segments has `choices` frames (an odd number), evenly spaced. The middle one
    is the segment's midpoint, so one file serves uniform and random sampling. A file records its `source`: if
    the video changes, it is decoded again; if the video is removed, the file remains valid. JPEG changes
    pixels by 1 to 2 of 255 on average; raw frames would be 7 times larger."""

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
        except (OSError, zipfile.BadZipFile):
            return None
        return file if is_current(file.comment, clip) else None

    def frames(
        self, clip: Clip, generator: torch.Generator | None = None
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        """The frames of a clip, decoded into the cache if they are not there.

        Without a generator, the segments' midpoints; with one, a random choice in each. Raises DataError."""
        file = self._open(clip)
        if file is None:
            self._write(clip)
            file = zipfile.ZipFile(self.path(clip))
        picks = torch.full((self.num_frames,), self.choices // 2)
        if generator is not None:
            picks = torch.randint(self.choices, (self.num_frames,), generator=generator)
        with file:
            numbers = [segment * self.choices + pick for segment, pick in enumerate(picks.tolist())]
            pictures = [Image.open(io.BytesIO(file.read(f"{number:03d}.jpg"))) for number in numbers]
        return np.stack([np.asarray(picture) for picture in pictures])

    def _write(self, clip: Clip) -> None:
        made_from = source(clip)  # before decoding, in case the video changes meanwhile
        content = io.BytesIO()
        frames = decode_frames(clip.path, self.num_frames * self.choices, clip.start, clip.end)
        with zipfile.ZipFile(content, "w") as file:
            for number, frame in enumerate(frames):
                picture = io.BytesIO()
                image = Image.fromarray(resize(frame, self.size))
                image.save(picture, "JPEG", quality=self.QUALITY, subsampling=0)
                file.writestr(zipfile.ZipInfo(f"{number:03d}.jpg"), picture.getvalue())  # without a date
            file.comment = made_from
        save(self.path(clip), content.getvalue())

    def fill(self, clips: Sequence[Clip]) -> dict[str, str]:
        """Decodes the clips that are not in the cache, on all cores. Returns {clip id: why} of failures."""
        remove_leftovers(self.folder)
        todo = [clip for clip in clips if self._open(clip) is None]
        reasons = in_parallel(self._try, todo, "decoding frames")
        return {clip.id: reason for clip, reason in zip(todo, reasons) if reason}

    def _try(self, clip: Clip) -> str | None:
        try:
            self._write(clip)
        except DataError as error:
            return str(error)


def save(path: Path, content: bytes) -> None:
    """Writes a file of a cache atomically. Raises DataError if it cannot be written."""
    advice = "make room or name another folder with --data; what is written so far is kept."
    with writing(path, DataError, advice):
        write_atomic(path, content)


def file_name(clip: Clip) -> str:
    """A clip's id as a file name: %XX except for letters, digits and _.-~; a long one ends in a hash."""
    name = urllib.parse.quote(clip.id, safe="")
    return name if len(name) <= 150 else f"{name[:100]}~{hashlib.sha256(clip.id.encode()).hexdigest()[:16]}"


def source(clip: Clip) -> bytes:
    """What a clip's frames depend on: id, window, file size, time of change. Empty without the video."""
    try:
        stat = clip.path.stat()
    except OSError:
        return b""
    return f"{clip.id} {clip.start:g} {clip.end} {stat.st_size} {stat.st_mtime_ns}".encode()


def is_current(made_from: bytes, clip: Clip) -> bool:
    """Whether cached data with this `source` is valid for a clip. A missing video counts as unchanged."""
    now = source(clip)
    return made_from == now if now else made_from.startswith(f"{clip.id} {clip.start:g} {clip.end} ".encode())


def in_parallel(work: Callable[[Item], Result], items: Sequence[Item], what: str) -> list[Result]:
    """[work(item) for each item] in threads, one for each core, with a progress bar named `what`."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        results = pool.map(work, items)
        return list(tqdm(results, total=len(items), desc=what, unit=" clips", disable=len(items) < 50))
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C, waiting items are dropped
