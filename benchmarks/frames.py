"""Speed and exactness of reading frames: engine.frames, its cache, and other libraries, on the same clips.

    pip install opencv-python-headless av torchcodec decord    # any of them, for this script alone
    python benchmarks/frames.py FOLDER_OF_CLIPS [--odd FOLDER_OF_UNUSUAL_FILES]

12 frames a clip, shorter side 224 px. Each way runs in its own process, one after the other, ROUNDS times.
The median counts. Two clips are read at a time, each with one thread. CPU seconds include child processes.

A frame is exact if it is the one that a decode of the whole file, without a seek, shows at the midpoint.
Libraries may convert colours in their own way, so a frame counts as exact if no other frame of the clip is
nearer to it than the right one. Clips that cannot be decoded to the end are left out. The growth is that of
one clip, repeated 1 to 32 times. Writes benchmarks/frames.json.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.own_process import first_line, in_own_process  # noqa: E402
from data import ClipDataset  # noqa: E402
from engine.datasets import Clip  # noqa: E402
from engine.ffmpeg import check_ffmpeg  # noqa: E402
from engine.files import DataError  # noqa: E402
from engine.frames import FrameCache, count_packets, decode_frames, resize, segment_midpoints  # noqa: E402
from engine.video import _probe, every_frame  # noqa: E402

FRAMES, SIZE, ROUNDS, AT_ONCE = 12, 224, 3, 2
LENGTHS = (1, 2, 4, 8, 16, 32)  # a clip repeated so many times, for the growth


# ---- the ways: FRAMES frames of a clip


def ours(clip: Clip, _) -> list[np.ndarray]:
    """Decodes with engine.frames."""
    return decode_frames(clip.path, FRAMES, size=SIZE)


def opencv(clip: Clip, _) -> list[np.ndarray]:
    """Decodes as the released code: OpenCV's frame count, then a seek for each frame."""
    import cv2

    cv2.setNumThreads(1)
    video = cv2.VideoCapture(str(clip.path))
    frames = []
    for number in segment_midpoints(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), FRAMES):
        video.set(cv2.CAP_PROP_POS_FRAMES, number)
        good, frame = video.read()
        if not good:
            raise ValueError(f"{clip.path}: frame {number} cannot be read")
        frames.append(resize(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), SIZE))
    return frames


def pyav(clip: Clip, _) -> list[np.ndarray]:
    """Counts the packets, then decodes from the start to the last chosen frame."""
    import av

    with av.open(str(clip.path)) as file:
        count = sum(packet.size > 0 for packet in file.demux(video=0))
    wanted, found = segment_midpoints(count, FRAMES), {}
    with av.open(str(clip.path)) as file:
        file.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(file.decode(video=0)):
            if number in wanted:
                found[number] = resize(frame.to_ndarray(format="rgb24"), SIZE)
            if number == wanted[-1]:
                break
    return [found[number] for number in wanted]


def torchcodec(clip: Clip, _, mode: str = "exact") -> list[np.ndarray]:
    """Decodes with TorchCodec. exact: it scans the file for the place of each frame first."""
    from torchcodec.decoders import VideoDecoder

    file = VideoDecoder(clip.path, seek_mode=mode, dimension_order="NHWC", num_ffmpeg_threads=1)
    frames = file.get_frames_at(segment_midpoints(len(file), FRAMES))
    return [resize(frame, SIZE) for frame in frames.data.numpy()]


def approximate(clip: Clip, _) -> list[np.ndarray]:
    """Decodes with TorchCodec, which takes the place of each frame from the header of the file."""
    return torchcodec(clip, _, "approximate")


def decord(clip: Clip, _) -> list[np.ndarray]:
    """Decodes with decord's get_batch."""
    import decord

    file = decord.VideoReader(str(clip.path), num_threads=1)
    frames = file.get_batch(segment_midpoints(len(file), FRAMES)).asnumpy()
    return [resize(frame, SIZE) for frame in frames]


def cached(clip: Clip, cache: FrameCache) -> list[np.ndarray]:
    """Reads the frames from the cache."""
    return list(cache.frames(clip))


def augmented(clip: Clip, cache: FrameCache) -> list:
    """Reads a training item from the cache, with a random crop and flip."""
    return list(ClipDataset([clip], cache, augmentation=(0, 0))[0, 0][0])


@dataclass(frozen=True)
class Way:
    """A way to read frames."""

    read: Callable[[Clip, FrameCache], list]
    package: str = ""  # of PyPI, where the project does not need it
    repeats: int = 1  # of all clips in a round
    compared: bool = True  # whether its frames are whole ones


WAYS = {
    "OpenCV, a seek a frame (the released code)": Way(opencv, "opencv-python-headless"),
    "decode (ours)": Way(ours),
    "PyAV, decode to the last frame": Way(pyav, "av"),
    "TorchCodec, exact": Way(torchcodec, "torchcodec"),
    "TorchCodec, approximate": Way(approximate, "torchcodec"),
    "decord": Way(decord, "decord"),
    "from the cache": Way(cached, repeats=5),
    "from the cache, cropped and flipped": Way(augmented, repeats=5, compared=False),
}
OURS = "decode (ours)"


# ---- measurement


def version(package: str) -> str:
    """The version of an installed package; "" if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cpu_seconds() -> float:
    """The CPU seconds of this process and its children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def attempt(name: str, clip: Clip, cache: FrameCache) -> list | str:
    """The frames of a clip, or why they cannot be read."""
    try:
        frames = WAYS[name].read(clip, cache)
    except Exception as error:  # each library has its own
        return first_line(error)
    return frames if len(frames) == FRAMES else f"{len(frames)} frames"


def measure(name: str, clips: list[Clip], folder: Path, at_once: int = AT_ONCE) -> dict:
    """CPU and wall-clock seconds for each clip that a way reads; its frames, thinned; errors by clip."""
    import torch

    torch.set_num_threads(1)
    cache, way = FrameCache(folder, FRAMES, SIZE), WAYS[name]
    attempt(name, clips[0], cache)  # imports
    _probe.cache_clear()
    with ThreadPoolExecutor(at_once) as pool:
        started, cpu = time.perf_counter(), cpu_seconds()
        found = list(pool.map(lambda clip: attempt(name, clip, cache), clips * way.repeats))
        seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    read = sum(not isinstance(frames, str) for frames in found)
    by_clip = {clip.id: frames for clip, frames in zip(clips, found)}
    failed = {clip: frames for clip, frames in by_clip.items() if isinstance(frames, str)}
    thin = {clip: [thinned(f) for f in frames] for clip, frames in by_clip.items() if clip not in failed}
    each = dict(cpu=cpu / read, wall=seconds / read) if read else dict(cpu=None, wall=None)
    return {**each, "frames": thin if way.compared else {}, "failed": failed}


def measure_each(name: str, clips: list[Clip], folder: Path) -> list[float | None]:
    """CPU seconds of each clip, the least of ROUNDS measurements; None for one that is not read."""
    found = [[measure(name, [clip], folder, at_once=1)["cpu"] for _ in range(ROUNDS)] for clip in clips]
    return [None if None in seconds else min(seconds) for seconds in found]


def thinned(frame: np.ndarray) -> np.ndarray:
    """Every fourth pixel of each direction: enough to tell which frame of a clip it is."""
    return frame[::4, ::4]


def decoded(clip: Clip) -> list[np.ndarray]:
    """All frames of a clip, by a decode without a seek; none if it cannot be decoded to the end."""
    try:
        return [thinned(resize(frame, SIZE)) for _, frame in every_frame(clip.path)]
    except DataError:
        return []


def exact(frames: list[np.ndarray], whole: list[np.ndarray]) -> int:
    """How many of the frames are those at the midpoints of the whole clip."""
    count = 0
    for frame, number in zip(frames, segment_midpoints(len(whole), FRAMES)):
        if frame.shape == whole[number].shape:
            apart = [np.abs(np.subtract(frame, other, dtype=np.int16)).sum() for other in whole]
            count += int(apart[number] == min(apart))
    return count


def compared(clips: list[Clip], folder: Path, rounds: int) -> tuple[int, list[dict]]:
    """How many clips can be decoded to the end; a row for each way that is installed, over those clips."""
    wholes = {clip.id: frames for clip in clips if (frames := decoded(clip))}
    clips = [clip for clip in clips if clip.id in wholes]
    assert FrameCache(folder, FRAMES, SIZE).fill(clips) == {}
    answers = {name: [] for name, way in WAYS.items() if not way.package or version(way.package)}
    for _ in range(rounds):
        for name, found in answers.items():
            crashed = dict(cpu=None, wall=None, frames={}, failed={clip.id: "crash" for clip in clips})
            found.append(in_own_process(measure, name, clips, folder)[0] or crashed)
    rows = []
    for name, found in answers.items():
        frames, failed = found[-1]["frames"], found[-1]["failed"]
        for clip, why in failed.items():
            print(f"{name}: {clip}: {why}")
        right = sum(exact(some, wholes[clip]) for clip, some in frames.items())
        row = {"way": name, "read": len(clips) - len(failed)}
        for kind in ("cpu", "wall"):
            seconds = [answer[kind] for answer in found if answer[kind] is not None]
            row[kind] = statistics.median(seconds) if seconds else None
        rows.append({**row, "exact": right / (FRAMES * len(frames)) if frames else None})
    return len(clips), rows


def growth(clip: Clip, folder: Path, lengths: tuple[int, ...]) -> dict:
    """CPU seconds of each way against the length of a clip, repeated without new compression.

    The exponent is p of seconds = c frames^p, fitted to the three largest lengths."""
    clips = []
    for times in lengths:
        path = folder / f"{times} times.mkv"
        command = [check_ffmpeg(), "-v", "error", "-stream_loop", times - 1, "-i", clip.path, "-map", "0:V:0"]
        subprocess.run([*map(str, command), "-c", "copy", str(path)], check=True, stdin=subprocess.DEVNULL)
        clips.append(Clip(path.name, path, ("a caption",), "train"))
    counts, rows = [count_packets(clip.path) for clip in clips], []
    for name, way in WAYS.items():
        if way.repeats > 1 or (way.package and not version(way.package)):
            continue  # the cache does not depend on the length
        seconds = in_own_process(measure_each, name, clips, folder)[0] or [None] * len(clips)
        known = None not in seconds
        power = float(np.polyfit(np.log(counts[-3:]), np.log(seconds[-3:]), 1)[0]) if known else None
        rows.append({"way": name, "cpu": seconds, "exponent": power})
    return {"frames": counts, "rows": rows}


def clips_of(folder: Path) -> list[Clip]:
    """The files of a folder as clips."""
    return [Clip(path.name, path, ("a caption",), "train") for path in sorted(folder.iterdir())]


# ---- the tables of docs/data.md


def tables(found: dict) -> str:
    """Two tables in Markdown, of the content of benchmarks/frames.json."""
    base = next(row for row in found["rows"] if row["way"] == OURS)
    odd = {row["way"]: row for row in found.get("odd", {}).get("rows", [])}
    head = ["way", "CPU s a clip", "of ours", "wall s a clip", "of ours", "clips read", "exact frames"]
    head += ["unusual files read", "exact frames"] if odd else []
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    there = {row["way"]: row for row in found["rows"]}
    for name in WAYS:
        if (row := there.get(name)) is None:
            lines.append(f"| {name} | not installed" + " |" * (len(head) - 1))
            continue
        cells = [name]
        for kind in ("cpu", "wall"):
            known = row[kind] is not None
            cells += [f"{row[kind]:.4f}", f"{row[kind] / base[kind]:.2f}"] if known else ["", ""]
        cells += [f"{row['read']} of {found['clips']}", percent(row["exact"])]
        if odd:
            cells += [f"{odd[name]['read']} of {found['odd']['clips']}", percent(odd[name]["exact"])]
        lines.append("| " + " | ".join(cells) + " |")
    if "growth" in found:
        counts = [f"{count:,} frames" for count in found["growth"]["frames"]]
        lines += ["", "| CPU s of a clip of | " + " | ".join(counts) + " | exponent |"]
        lines.append("|---" + "|---:" * (len(counts) + 1) + "|")
        for row in found["growth"]["rows"]:
            cells = ["failed" if seconds is None else f"{seconds:.3f}" for seconds in row["cpu"]]
            power = "" if row["exponent"] is None else f"{row['exponent']:.2f}"
            lines.append(f"| {row['way']} | " + " | ".join(cells) + f" | {power} |")
    return "\n".join(lines)


def percent(part: float | None) -> str:
    """A part of 1 in percent; "" if it is not known."""
    return "" if part is None else f"{100 * part:.1f} %"


def main() -> None:
    """Measures each way, prints the tables, writes the JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--odd", type=Path, help="a folder of unusual files: read, compared, not timed")
    options = parser.parse_args()
    clips = clips_of(options.folder)
    versions = {way.package: version(way.package) for way in WAYS.values() if way.package}
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    with tempfile.TemporaryDirectory() as folder:
        cache = FrameCache(Path(folder), FRAMES, SIZE)
        count, rows = compared(clips, Path(folder), ROUNDS)
        size = statistics.mean(file.stat().st_size for file in cache.folder.iterdir())
        found = dict(machine=machine, versions=versions, clips=count, cache_bytes_a_clip=size, rows=rows)
        if options.odd:
            unusual, rows = compared(clips_of(options.odd), Path(folder) / "odd", 1)
            rows = [{key: row[key] for key in ("way", "read", "exact")} for row in rows]
            found["odd"] = dict(clips=unusual, rows=rows)
        middle = sorted(clips, key=lambda clip: clip.path.stat().st_size)[len(clips) // 2]
        found["growth"] = growth(middle, Path(folder), LENGTHS)
    found["steps/s a core"] = steps = 1 / (32 * found["rows"][-1]["cpu"])
    print(f"{size / 1024:.0f} KiB a clip in the cache; {count} of {len(clips)} clips\n\n{tables(found)}")
    print(f"\nOne core loads {steps:.1f} batches of 32 clips a second from the cache, cropped and flipped.")
    (ROOT / "benchmarks" / "frames.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
