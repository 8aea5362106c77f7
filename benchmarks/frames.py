"""Speed of reading frames: engine.frames, its cache, and OpenCV's seek for each frame, on the same clips.

    pip install opencv-python-headless                # for this script alone
    python benchmarks/frames.py FOLDER_OF_CLIPS

12 frames a clip, shorter side 224 px. Each way runs in its own process, one after the other. CPU seconds
include child processes. Clips that one of the ways cannot read are left out. Writes benchmarks/frames.json.
"""

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.own_process import in_own_process  # noqa: E402
from data import ClipDataset  # noqa: E402
from engine.datasets import Clip  # noqa: E402
from engine.files import DataError  # noqa: E402
from engine.frames import FrameCache, decode_frames, resize, segment_midpoints  # noqa: E402

FRAMES, SIZE, REPEATS = 12, 224, 5


def ours(clip: Clip, _) -> list[np.ndarray]:
    """Decodes with engine.frames."""
    return [resize(frame, SIZE) for frame in decode_frames(clip.path, FRAMES)]


def opencv(clip: Clip, _) -> list[np.ndarray]:
    """Decodes as the released code: OpenCV's frame count, then a seek for each frame; the same resize."""
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


def cached(clip: Clip, cache: FrameCache) -> list[np.ndarray]:
    """Reads the frames from the cache."""
    return list(cache.frames(clip))


def batches(clip: Clip, cache: FrameCache) -> list:
    """Reads a training item from the cache, with a random crop and flip."""
    return list(ClipDataset([clip], cache, augmentation=(0, 0))[0, 0][0])


WAYS = {
    "OpenCV, a seek a frame": opencv,
    "decode": ours,
    "cached": cached,
    "cached, cropped and flipped": batches,
}


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and its children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def measure(name: str, clips: list[Clip], folder: str) -> dict:
    """Returns clips/s and CPU seconds a clip of one way. Cached clips are read several times."""
    import torch

    torch.set_num_threads(1)
    cache, way = FrameCache(Path(folder), FRAMES, SIZE), WAYS[name]
    way(clips[0], cache)
    started, cpu = time.perf_counter(), cpu_seconds()
    repeats = REPEATS if name.startswith("cached") else 1
    for clip in clips * repeats:
        assert len(way(clip, cache)) == FRAMES
    count = len(clips) * repeats
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    return {"way": name, "clips/s": count / seconds, "CPU s a clip": cpu / count}


def usable(clip: Clip) -> bool:
    """Whether both OpenCV and engine.frames can read a clip."""
    try:
        return len(opencv(clip, None)) == len(ours(clip, None)) == FRAMES
    except (ValueError, DataError):
        return False


def main() -> None:
    """Measures each way on the clips of a folder, prints the table, writes the JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path)
    paths = sorted(parser.parse_args().folder.iterdir())
    found = [Clip(path.name, path, ("a caption",), "train") for path in paths]
    clips = [clip for clip in found if usable(clip)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cache = FrameCache(Path(folder), FRAMES, SIZE)
        assert cache.fill(clips) == {}
        size = sum(cache.path(clip).stat().st_size for clip in clips) / len(clips)
        for name in WAYS:
            row, code = in_own_process(measure, name, clips, folder)
            if row is None:
                sys.exit(f"{name}: failed, exit code {code}")
            rows.append(row)
    base = rows[0]
    print(f"{len(clips)} of {len(found)} clips, {size / 1024:.0f} KiB a clip in the cache\n")
    print("| way | clips/s | CPU s a clip | clips/s, ratio | CPU, ratio |\n|---|---:|---:|---:|---:|")
    for row in rows:
        ratios = f"{row['clips/s'] / base['clips/s']:.1f} | {base['CPU s a clip'] / row['CPU s a clip']:.1f}"
        print(f"| {row['way']} | {row['clips/s']:.1f} | {row['CPU s a clip']:.4f} | {ratios} |")
    steps = 1 / (32 * rows[-1]["CPU s a clip"])
    print(f"\nOne core loads {steps:.1f} batches of 32 clips a second from the cache, with crops and flips.")
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    about = dict(machine=machine, clips=len(clips), cache_bytes_a_clip=size)
    content = json.dumps({**about, "rows": rows, "steps/s a core": steps}, indent=1)
    (ROOT / "benchmarks" / "frames.json").write_text(content + "\n")


if __name__ == "__main__":
    main()
