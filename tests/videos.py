"""Small videos of every container, made by ffmpeg, and what a full sequential decode says of them."""

import functools
import random
import re
import subprocess
import tempfile
import zlib
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from engine.video import decode_frames, segment_midpoints

FOLDER = tempfile.TemporaryDirectory(prefix="videos-")
SOURCE = "testsrc2=size=96x64:rate=25:duration=8"
X264 = "-c:v libx264 -preset veryfast -threads 1 -sc_threshold 0"


def ffmpeg(*options) -> str:
    """Runs ffmpeg and returns its log."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-y", *map(str, options)]
    return subprocess.run(command, capture_output=True, check=True).stderr.decode(errors="replace")


def make(path: Path, options: str = X264, source: str = SOURCE) -> Path:
    """A video of the test picture, in which no two frames are equal."""
    ffmpeg("-f", "lavfi", "-i", source, *options.split(), path)
    return path


def crc(frame: np.ndarray) -> str:
    """CRC-32, which takes a third of the time of MD5."""
    return f"{zlib.crc32(frame.tobytes()):08x}"


def reference(path: Path, stream: str = "0:V:0") -> tuple[list[str], list[float]]:
    """CRC-32 and time of every frame, by one sequential decode without any seek or choice."""
    output = Path(FOLDER.name) / "reference.txt"  # never beside the video: it may belong to others
    options = "-vf showinfo=checksum=0 -fps_mode passthrough -noautoscale -c:v rawvideo -pix_fmt rgb24"
    options += " -f framehash -hash CRC32"
    log = ffmpeg("-i", f"file:{path}", "-map", stream, *options.split(), output)
    lines = [line for line in output.read_text().splitlines() if not line.startswith("#")]
    over, under = re.search(r"config in time_base: (\d+)/(\d+)", log).groups()
    ticks = re.findall(r"Parsed_showinfo_0 @ \w+\] n: *\d+ pts: *(-?\d+)", log)
    return [line.split()[-1] for line in lines], [int(t) * int(over) / int(under) for t in ticks]


def assert_exact(path: Path, windows: int = 2, longest: float = 1.5) -> None:
    """The frames of the whole file and of random windows are those of the reference."""
    whole, times = reference(path)
    assert len(whole) == len(times) > 0
    found = [crc(frame) for frame in decode_frames(path, 12)]
    assert found == [whole[n] for n in segment_midpoints(len(whole), 12)]
    draw = random.Random(path.name)
    for _ in range(windows):
        start = round(draw.uniform(times[0], times[-1]), 2)
        end = round(start + draw.uniform(0.05, longest), 2)
        before = [n for n, time in enumerate(times) if time <= start][-1:]
        shown = before + [n for n, time in enumerate(times) if start < time < end]
        found = [crc(frame) for frame in decode_frames(path, 5, start, end)]
        assert found == [whole[shown[n]] for n in segment_midpoints(len(shown), 5)], (start, end)


CONTAINERS = {
    "b-frames.mp4": f"{X264} -g 50 -bf 3",
    "open-gop.mkv": f"{X264} -x264-params open-gop=1:keyint=50:bframes=3",
    "fragmented.mp4": f"{X264} -g 25 -bf 2 -movflags frag_keyframe+empty_moov",
    "long-gop.ts": f"{X264} -g 100 -bf 2",
    "one-gop.m2ts": f"{X264} -g 1000 -bf 2",
    "intra-refresh.ts": f"{X264} -x264-params intra-refresh=1:keyint=50:bframes=0",
    "b-frames.avi": "-c:v mpeg4 -g 60 -bf 2",
    "h264.flv": f"{X264} -g 50 -bf 3",
    "wmv2.wmv": "-c:v wmv2 -g 60",
    "mpeg2.mpg": "-c:v mpeg2video -g 30 -bf 2 -f vob",
    "mpeg1.mpeg": "-c:v mpeg1video -g 30 -bf 2",
    "theora.ogv": "-c:v libtheora -g 60",
    "vp9.webm": "-c:v libvpx-vp9 -g 60 -auto-alt-ref 1 -lag-in-frames 16 -cpu-used 8 -deadline realtime",
    "h263.3gp": "-c:v h263 -s 176x144 -g 60",
    "anim.gif": "-r 10",
    "sparse.mp4": f"{X264} -vf select='not(mod(n\\,9))+lt(n\\,50)' -fps_mode vfr -g 20 -bf 2",
    "raw.h264": f"{X264} -g 50 -bf 2",
}


@functools.cache
def container(name: str) -> Path:
    """A file of CONTAINERS."""
    return make(Path(FOLDER.name) / name, CONTAINERS[name])
