"""Exact frames of a video file, decoded by ffmpeg.

Times are those of a player: seconds from the start of the file; in MPEG-TS and MPEG-PS, from the first video
packet. A frame is on screen until the next one.
"""

import bisect
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from engine import ffmpeg
from engine.ffmpeg import RAW, SHOW, Frame, Log, OtherStream, Run, Shown, TooLarge, Video, check_shape, opened
from engine.files import PICTURE_SUFFIXES, DataError
from engine.pictures import read_picture

SHORT_FILE = 2**18  # bytes: smaller files are decoded whole, in one pass
SHORT_PIPE = 2**22  # bytes of decoded frames at which such a pass stops
LARGE = 2**24  # pixels: of files with larger frames, one is decoded at a time
MANY = 500  # frames: if more are wanted, all frames are read
SKIP = 2000  # packets: if fewer need not be decoded, the whole file is
HEAD = 64  # packets: so many at the start are always decoded, since frames that are not shown are often there
MARGINS = (0.0, 2.0, 10.0, 60.0)  # seconds before a window at which ffmpeg is asked to start

_one_large = threading.Lock()


# ---- packets: counted and timed without decoding


@dataclass
class Packets:
    """The packets of a video, in the file's order."""

    marks: np.ndarray  # a hash of the time and content of each
    times: np.ndarray  # seconds
    tick: float  # seconds: the unit of the times
    end: float  # seconds: where the last one ends
    length: float  # seconds: the same, or the file's own statement if it is longer
    codec: str
    plain: bool  # whether each has a time, none is marked to be discarded, and none brings other data


# mark, whether it is a key frame; time, end, tick in seconds; whether it is plain
Packet = tuple[int, bool, float, float, float, bool]
COPY = "-c copy -copyinkf -f framecrc pipe:1".split()
UNKNOWN = -(2**63)  # a packet without a time
PLAIN = {b"F=0x0", b"F=0x10"}  # flags of packets: none, not needed by others; a key frame's is not listed


def _packets(lines: Iterable[bytes]) -> Iterator[Packet]:
    """The packets that ffmpeg's framecrc lists, of all streams."""
    scales = {}
    for line in lines:
        if line.startswith(b"#tb "):
            stream, scale = line[4:].split(b":")
            scales[stream.strip()] = [int(number) for number in scale.split(b"/")]
        elif not line.startswith(b"#"):
            stream, dts, pts, duration, size, checksum, *rest = line.split(b",")
            ticks, (over, under) = int(dts) if int(pts) == UNKNOWN else int(pts), scales[stream]
            mark, key = hash((ticks, size, checksum.strip())), not any(b"F=" in part for part in rest)
            plain = int(pts) != UNKNOWN and {part.strip() for part in rest} <= PLAIN
            yield mark, key, ticks * over / under, (ticks + int(duration)) * over / under, over / under, plain


@functools.lru_cache(maxsize=16)
def _probe(video: Video) -> Packets:
    """All packets of a video, about one a frame. Raises DataError for a truncated file."""
    with Run(video, ["-map", video.stream, *COPY]) as run:
        packets = list(_packets(run.process.stdout))
        run.finish()
    marks = np.array([mark for mark, *_ in packets], dtype=np.int64)
    times = np.array([seconds for _, _, seconds, *_ in packets])
    end, tick = max((packet[3:5] for packet in packets), default=(0.0, 0.0))
    codec, plain = run.log.streams.get(run.log.used, "").partition(" ")[0], all(last for *_, last in packets)
    return Packets(marks, times, tick, end, _length(video, run.log, end), codec, plain)


def _length(video: Video, log: Log, end: float) -> float:
    """The length of a file whose last frame ends at `end`. Raises DataError if it declares a longer one.

    Other streams are read only if the frames are too few. Not declared: MPEG-TS, MPEG-PS, OGG, GIF."""
    declared = log.declared if log.format.split(",")[0] in ("mov", "matroska", "flv", "asf", "avi") else 0.0
    slack = 0.5 + declared / 200
    if declared > end + slack and not log.format.startswith("mov"):  # ffmpeg reports a cut MP4 itself
        with Run(video, ["-map", "0:v?", "-map", "0:a?", "-map", "0:s?", *COPY]) as run:
            found = max((packet[3] for packet in _packets(run.process.stdout)), default=0.0)
            run.finish()
        if declared > found + slack:
            what = f"it declares {declared:g} s and holds {found:g} s"
            raise DataError(f"{video.path} is truncated, {what}: copy or download it again.")
    return max(declared, end)


def count_packets(path: Path) -> int:
    """The number of a video's packets, about one a frame. Nothing is decoded. Raises DataError."""
    with opened(path) as video:
        return len(_attempt(video, lambda: _probe(video)).marks)


def duration(path: Path) -> float:
    """The length of a video in seconds: the end of its last packet. Nothing is decoded. Raises DataError."""
    with opened(path) as video:
        packets = _attempt(video, lambda: _probe(video))
    if not len(packets.marks):
        raise DataError(f"{path} holds no frame: replace it or delete its rows.")
    return packets.end


# ---- frames


def segment_midpoints(count: int, num_frames: int) -> list[int]:
    """The frame numbers at the middle of `num_frames` equal segments of a video of `count` frames.

    If there are fewer frames than segments, numbers are repeated."""
    return [(2 * k + 1) * count // (2 * num_frames) for k in range(num_frames)]


def resize(frame: Frame, size: int) -> UInt8[np.ndarray, "new_height new_width 3"]:
    """The frame with a shorter side of `size` pixels, by Pillow's bicubic filter, as in CLIP."""
    height, width = frame.shape[:2]
    new = (size, size * height // width) if width <= height else (size * width // height, size)
    return np.asarray(Image.fromarray(frame).resize(new, Image.Resampling.BICUBIC))


def decode_frames(
    path: Path, num_frames: int, start: float = 0.0, end: float | None = None, size: int | None = None
) -> list[Frame]:
    """`num_frames` frames of a video at the midpoints of equal segments, rotated as the file says.

    The frame numbers are exact. With start and end (seconds), the segments divide the frames that a player
    shows from start to before end, beginning with the one on screen at start. Frames at the start of a file
    that cannot be decoded are left out. Each frame has its own size; with `size`, each is resized at once,
    which needs little memory. Pixels are the stored ones: not stretched where they are not square, and HDR is
    not tone-mapped. A picture is a video of one frame, or of the frames of its animation.

    Raises DataError for a file that is missing, unreadable, no video, encrypted, truncated, damaged, too
    large or too slow, and for a window without frames."""
    keep = functools.partial(resize, size=size) if size else lambda frame: frame
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return _keep_pictures(path, read_picture(path, num_frames), keep)
    with opened(path) as video:
        frames = _attempt(video, lambda: _decode(video, num_frames, start, end, keep))
    if not frames:
        where = f" from {start:g} s" + (f" to {end:g} s" if end is not None else "")
        where = where if start or end is not None else ""
        raise DataError(f"{path} holds no frame{where} that can be decoded: replace it or delete its rows.")
    return frames


def _keep_pictures(path: Path, frames: list, keep: Callable) -> list:
    """keep(frame) of each; the same frame is kept once."""
    kept = {}
    for frame in frames:
        if id(frame) not in kept:
            check_shape(path, *frame.shape[:2])
            kept[id(frame)] = keep(frame)
    return [kept[id(frame)] for frame in frames]


def _attempt(video: Video, work: Callable):
    """work(), with the file's default video stream; where frames are large, after that of other files."""
    for most, guard in ((min(LARGE, ffmpeg.max_pixels), nullcontext()), (ffmpeg.max_pixels, _one_large)):
        video.most = most
        with guard:
            try:
                return work()
            except OtherStream as other:
                video.stream = f"0:{other.args[0]}"
            except TooLarge as error:
                large = error.args[0]
                continue
            try:
                return work()
            except TooLarge as error:
                large = error.args[0]
    what = f"has frames of {large} pixels, more than the limit of {ffmpeg.max_pixels:,}"
    raise DataError(f"{video.path} {what}: raise --max-pixels, or replace it.")


def _decode(video: Video, num_frames: int, start: float, end: float | None, keep: Callable) -> list[Frame]:
    """The frames of decode_frames; none if the window holds none."""
    window = start > 0 or end is not None
    if video.size < SHORT_FILE and (found := _read_short(video)) is not None:
        times, frames, length = found
        numbers = _on_screen(times, start, end, length) if window else range(len(frames))
        wanted = _midpoints(numbers, num_frames)
        kept = {number: keep(frames[number]) for number in {*wanted}}
        return [kept[number] for number in wanted]
    packets = _probe(video)
    if not window:
        found = _decode_some(video, packets, num_frames, keep)
        return found or _decode_whole(video, num_frames, len(packets.marks), keep)
    until = None if end is None else end + packets.tick + 1e-6  # ffmpeg rounds to ticks
    seek, times = _timeline(video, packets, start, until)
    wanted = _midpoints(_on_screen(times, start, end, packets.length), num_frames)
    return _pick(video, wanted, keep, times, seek, until) if wanted else []


def _midpoints(numbers: Sequence[int], num_frames: int) -> list[int]:
    return [numbers[n] for n in segment_midpoints(len(numbers), num_frames)] if numbers else []


def _read_short(video: Video) -> tuple[list[Shown], list[Frame], float] | None:
    """All frames of a video and its length, in one pass; None if they take more than SHORT_PIPE bytes."""
    times, frames, size = [], [], 0
    with Run(video, ["-map", video.stream, "-vf", SHOW, *RAW]) as run:
        for shown, frame in run.frames():
            times.append(shown)
            frames.append(frame)
            if (size := size + frame.nbytes) > SHORT_PIPE:
                return None
        run.finish()
    end = max(((shown.time or 0.0) + shown.duration for shown in times), default=0.0)
    return times, frames, _length(video, run.log, end)


def _decode_whole(video: Video, num_frames: int, count: int, keep: Callable) -> list[Frame]:
    """The frames at the midpoints of a whole video. count: of its packets; some may never be shown."""
    every = num_frames > MANY
    for _ in range(4):
        wanted = segment_midpoints(count, num_frames) if count else []
        found = _read(video, {*wanted}, keep, every=every)
        if found is None:
            every = True
        elif found[1] == count:
            return [found[0][number][1] for number in wanted]
        else:
            count = found[1]
    return []


# ---- long files: only what the chosen frames need

# Units of an IDR frame, at which a decoder starts anew, and of the parameters of the decoder.
UNITS = {"h264": ("5", "7|8"), "hevc": ("19|20", "32|33|34")}


def _decode_some(video: Video, packets: Packets, num_frames: int, keep: Callable) -> list[Frame] | None:
    """The frames at the midpoints of a long file, decoded from the last IDR frame before each of them.

    None if the whole file has to be decoded: if that is little more, if the packets do not tell the order of
    the frames, if the decoder reports an error, or if it shows other frames than these packets'. Damage of
    packets that are left out is not noticed."""
    times, count = packets.times, len(packets.times)
    if count < SKIP or num_frames > MANY or not packets.plain or packets.codec not in UNITS:
        return None
    starts, order = _starts(video, packets), np.argsort(times)
    if not starts or (np.diff(times[order]) <= 0).any():
        return None
    wanted, lasts = [int(order[number]) for number in segment_midpoints(count, num_frames)], {0: HEAD - 1}
    for at in wanted:
        start = starts[bisect.bisect_right(starts, at) - 1]
        lasts[start] = max(lasts.get(start, at), at)
    used = np.unique(np.concatenate([np.arange(start, last + 1) for start, last in lasts.items()]))
    if count - len(used) < max(SKIP, count // 2):
        return None
    shown = np.sort(times[used])
    numbers = [int(number) for number in np.searchsorted(shown, times[wanted])]
    select = "select=" + "+".join(f"eq(n\\,{number})" for number in sorted({*numbers}))
    dropped = "not(" + "+".join(f"between(n,{start},{last})" for start, last in lasts.items()) + ")"
    options, found, seen = ["-map", video.stream, "-vf", f"{SHOW},{select}", *RAW], {}, []
    with Run(video, options, sieved=True, dropped=dropped) as run:
        for number, (frame, pixels) in enumerate(run.frames({*numbers})):
            seen.append(frame.time)
            if pixels is not None:
                found[number] = keep(pixels)
        run.wait()
    sound = run.process.returncode == 0 and not run.log.errors and not run.log.corrupt
    if not sound or len(seen) != len(shown) or None in seen or abs(shown - seen).max() > packets.tick / 2:
        return None
    return [found[number] for number in numbers]


def _starts(video: Video, packets: Packets) -> list[int]:
    """The numbers of the packets with an IDR frame. None are returned if the file is not made of parts, each
    from one IDR frame to the next, that are shown one after the other and bring no parameters in between."""
    idr, parameters = UNITS[packets.codec]
    filters = [
        "-bsf:v:0",
        f"filter_units=pass_types={idr}",
        "-bsf:v:1",
        f"filter_units=pass_types={parameters}",
    ]
    with Run(video, ["-map", video.stream, "-map", video.stream, *filters, *COPY]) as run:
        lines = list(run.process.stdout)
        run.wait()
    times, place = packets.times, {time: number for number, time in enumerate(packets.times.tolist())}
    starts, changes = (
        [
            place.get(seconds, -1)
            for _, _, seconds, *_ in _packets(x for x in lines if x.startswith((b"#", n)))
        ]
        for n in (b"0", b"1")
    )
    before, after = np.maximum.accumulate(times), np.minimum.accumulate(times[::-1])[::-1]
    ordered = all(times[n] == after[n] and (n == 0 or before[n - 1] < times[n]) for n in starts)
    return starts if starts[:1] == [0] and {*changes} <= {*starts} and ordered else []


def _pick(
    video: Video, wanted: list[int], keep: Callable, times: list[Shown], seek: float | None, end: float | None
) -> list[Frame]:
    """The frames of these numbers, from the same start as `times`."""
    for every in (len({*wanted}) > MANY, True):
        frames, _ = _read(video, {*wanted}, keep, seek, end, every) or ({}, 0)
        if all(number in frames and frames[number][0] == times[number].time for number in wanted):
            return [frames[number][1] for number in wanted]
    raise DataError(f"{video.path} is decoded to other frames each time: convert or replace it.")


def _read(
    video: Video,
    numbers: set[int],
    keep: Callable,
    seek: float | None = None,
    end: float | None = None,
    every: bool = False,
) -> tuple[dict[int, tuple[float | None, Frame]], int] | None:
    """Time and pixels of the frames of these numbers, and how many frames there are.

    ffmpeg picks them; every: it gives all frames, and they are picked here. None if the frame size changes:
    ffmpeg's filter then counts from zero again, so that `every` is needed."""
    filters = [*_until(end), SHOW]
    if not every and numbers:
        filters.append("select=" + "+".join(f"eq(n\\,{number})" for number in sorted(numbers)))
    found, count = {}, 0
    with Run(video, ["-map", video.stream, "-vf", ",".join(filters), *RAW], seek, not every) as run:
        for shown, pixels in run.frames(None if every else numbers):
            if count in numbers:
                found[count] = shown.time, keep(pixels)
            count += 1
        if not every and "changed" in run.log.marks:
            return None
        run.finish()
    return found, count


def _until(end: float | None) -> list[str]:
    """The filter that ends a window. The exact choice is made by `_on_screen`."""
    return [] if end is None else [f"trim=end={end:.6f}"]


def _on_screen(times: list[Shown], start: float, end: float | None, length: float) -> list[int]:
    """The numbers of the frames that a player shows from start to before end, of a file of this length."""
    known = [(number, shown.time) for number, shown in enumerate(times) if shown.time is not None]
    before = [number for number, time in known if time <= start + 1e-6][-1:]
    later = [(number, time) for number, time in known if time > start + 1e-6]
    inside = [number for number, time in later if end is None or time < end - 1e-6]
    return [*(before if later or start < length else []), *inside]


def _timeline(
    video: Video, packets: Packets, start: float, end: float | None
) -> tuple[float | None, list[Shown]]:
    """Where decoding of a window may start, and the frames from there on; None is the start of the file.

    Containers are not trusted: after a seek, the packets must be those of the whole file, with their times,
    from a key frame on that is shown by `start`. Else decoding starts earlier."""
    for seek in (start - margin for margin in MARGINS if start > margin):
        if (times := _times(video, packets, start, end, seek)) is not None:
            return seek, times
    return None, _times(video, packets, start, end)


def _times(
    video: Video, packets: Packets, start: float, end: float | None, seek: float | None = None
) -> list[Shown] | None:
    """The frames of a window, decoded but without pixels. None if they cannot be trusted after a seek."""
    options = ["-map", video.stream, "-vf", ",".join([*_until(end), SHOW])]
    options += ["-fps_mode", "passthrough", "-f", "null", "-", "-map", video.stream]
    options += [*([] if end is None else ["-to", f"{end:.6f}"]), *COPY]
    with Run(video, options, seek) as run:
        listed, first = _packets(run.process.stdout), 0.0
        if seek is not None and (first := _first_key(listed, packets, start, end)) is None:
            return None
        for _ in listed:
            pass
        run.finish() if seek is None else run.wait()
        times = list(iter(run.log.shown.get, None))
    if seek is None:
        return times
    key = next((number for number, shown in enumerate(times) if shown.key), len(times))
    for shown in times[:key]:
        shown.time = None
    found = [shown.time for shown in times[key:]]
    rising = all(None not in pair and pair[0] < pair[1] for pair in itertools.pairwise(found))
    sound = run.process.returncode == 0 and not run.log.errors and not run.log.corrupt
    sure = sound and found and rising and found[0] is not None and first - 1e-6 <= found[0] <= start + 1e-6
    return times if sure else None


def _first_key(listed: Iterator[Packet], packets: Packets, start: float, end: float | None) -> float | None:
    """The time of the first key frame after a seek, if it is not after `start` and what follows is right.

    Right: the packets that the whole file has there, up to `end`. Frames shown before the key frame do not
    matter; ffmpeg may change their times."""
    first, at = None, 0
    for mark, key, seconds, *_ in listed:
        if first is None:
            if not key:
                continue
            if seconds > start + 1e-6 or not len(found := np.flatnonzero(packets.marks == mark)):
                return None
            first, at = seconds, int(found[0])
        if at == len(packets.marks) or (packets.marks[at] != mark and seconds >= first):
            return None
        at += 1
    whole = at == len(packets.marks) or (end is not None and packets.times[at] >= end)
    return first if whole else None


def every_frame(path: Path, height: int = 0) -> Iterator[tuple[float, Frame]]:
    """Time and pixels of each frame of a video; with `height`, scaled by ffmpeg. Raises DataError."""
    filters = [f"scale=-2:{height}"] * bool(height) + [SHOW]
    with opened(path) as video:
        _attempt(video, lambda: _probe(video))  # finds the file's default video stream
        video.most, last = ffmpeg.max_pixels, 0.0
        with Run(video, ["-map", video.stream, "-vf", ",".join(filters), *RAW]) as run:
            for shown, frame in run.frames():
                last = last if shown.time is None else shown.time
                yield last, frame
            _attempt(video, run.finish)  # a frame that is too large becomes a DataError
