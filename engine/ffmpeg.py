"""Runs of ffmpeg on a video file: its command line, its log, its errors as sentences.

ffmpeg is given an open file, not a path, and may open nothing else. So a playlist cannot lead it to other
files, and its log holds no file name. Frames are read one at a time.
"""

import functools
import os
import queue
import re
import stat
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from jaxtyping import UInt8

from engine.files import DataError, not_found

MAX_PIXELS, TIME_LIMIT = 36_000_000, 120.0  # defaults of the flags; 8K is 8192 x 4320
# The limits of this process, from the environment, through which `set_limits` reaches its worker processes.
max_pixels = int(os.environ.get("TMASS_MAX_PIXELS", MAX_PIXELS))  # of a frame, at most
time_limit = float(os.environ.get("TMASS_TIME_LIMIT", TIME_LIMIT))  # seconds to read a file, plus 300 a MiB

LEAST_FFMPEG = 7
FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,asf,flv,ogg,gif,mxf,dv,ivf,nut,rm,wtv"
DAMAGED = 0.03  # a file is refused if a larger part of its frames is damaged
LONGEST = 100  # a frame is refused if one side is more than this many times the other
SHOW = "showinfo=checksum=0"
RAW = "-fps_mode passthrough -noautoscale -c:v rawvideo -pix_fmt rgb24 -f rawvideo pipe:1".split()

Frame = UInt8[np.ndarray, "_ _ 3"]  # its height and width differ from frame to frame
_running: set[subprocess.Popen] = set()
_stopping = threading.Event()


@dataclass(frozen=True)
class Limits:
    """What a video file may take, as flags."""

    max_pixels: int = MAX_PIXELS  # of a frame; a video with larger frames is refused
    time_limit: float = TIME_LIMIT  # seconds to read a file, plus 300 a MiB of it; longer: refused


LIMITS = Limits()


def set_limits(pixels: int, seconds: float) -> None:
    """Sets --max-pixels and --time-limit of this process and of those that it starts."""
    global max_pixels, time_limit
    max_pixels, time_limit = pixels, seconds
    os.environ.update(TMASS_MAX_PIXELS=str(pixels), TMASS_TIME_LIMIT=str(seconds))


# ---- what ffmpeg says


@dataclass(slots=True)
class Shown:
    """A decoded frame in ffmpeg's log. time, in seconds, is None if the file does not tell."""

    time: float | None
    duration: float
    key: bool
    height: int
    width: int


MARKS = {
    "Format not on whitelist": "no video",
    "matches no streams": "no video",
    "partial file": "cut",
    "File ended prematurely": "cut",
    "Reconfiguring filter graph": "changed",
    "DRM protected stream": "encrypted",
}
LINE = re.compile(r"\[([^]@]*) @ \w+\] (?:\[[^]]* @ \w+\] )*(.*)")
FRAME = re.compile(r"n: *\d+ pts: *(NOPTS|-?\d+) .*duration: *(\d+) .* s:(\d+)x(\d+) .*iskey:(\d)")
HEAD = re.compile(r"  Duration: (\d+):(\d+):([\d.]+),|Input #0, (\S+), from|  Stream #0:(\d+) -> #0:0 ")
STREAM = re.compile(r"  Stream #0:(\d+)\S*: Video: (.*)")


@dataclass
class Log:
    """The log of a run of ffmpeg, read line by line. Titles and comments of the file do not count."""

    changed: Callable[[], object] = lambda: None  # called when the frame size changes
    shown: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)  # of Shown; None ends it
    format: str = ""
    declared: float = 0.0  # seconds, by the file's header
    streams: dict[int, str] = field(default_factory=dict)  # video streams that are no attached pictures
    used: int | None = None  # the number of the stream that is read
    packets: int = 0
    errors: int = 0  # packets that cannot be decoded
    first: int = 0  # of them, those before the first frame
    corrupt: int = 0  # frames that are decoded in part
    marks: set[str] = field(default_factory=set)
    too_large: str = ""
    _started: bool = False
    _scale: tuple[int, int] = 0, 1  # seconds of a tick, as a fraction

    def read(self, lines: Iterator[bytes]) -> None:
        """Reads a log to its end."""
        for line in lines:
            self._line(line.decode(errors="replace").rstrip("\n"))
        self.shown.put(None)

    def _line(self, line: str) -> None:
        if found := LINE.match(line):
            (self._frame if found[1].startswith("Parsed_showinfo") else self._message)(*found.groups())
        elif found := HEAD.match(line):
            if found[1]:
                self.declared = int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3])
            self.format = found[4] or self.format
            self.used = int(found[5]) if found[5] else self.used
        elif (found := STREAM.match(line)) and self.used is None and "(attached pic)" not in found[2]:
            self.streams[int(found[1])] = found[2]
        elif line.startswith("      Encryption initialization data"):
            self.marks.add("encrypted")

    def _frame(self, _, text: str) -> None:
        if found := FRAME.match(text):
            over, under = self._scale
            seconds = None if found[1] == "NOPTS" else int(found[1]) * over / under
            sizes = int(found[4]), int(found[3])
            self.shown.put(Shown(seconds, int(found[2]) * over / under, found[5] == "1", *sizes))
        elif found := re.match(r"config in time_base: (\d+)/(\d+)", text):
            self._scale = int(found[1]), int(found[2])

    def _message(self, part: str, text: str) -> None:
        self.marks |= {mark for words, mark in MARKS.items() if words in text}
        if part.startswith("graph "):
            self._started = True
        elif text == "corrupt decoded frame":
            self.corrupt += 1
        elif text.startswith(("Error submitting packet to decoder", "Decoding error")):
            self.errors += 1
            self.first += not self._started
        elif text.startswith("Reconfiguring filter graph"):
            self.changed()
        elif found := re.search(r"Picture size (\d+)x(\d+) exceeds specified max pixel count", text):
            self.too_large = f"{found[1]} x {found[2]}"
        elif found := re.match(r"  Input stream #0:\d+ \(video\): (\d+) packets read", text):
            self.packets = int(found[1])


# ---- a run of ffmpeg


class TooLarge(Exception):
    """A frame has more pixels than this run allows. The argument is its size."""


class OtherStream(Exception):
    """Another video stream than the first is the file's default. The argument is its number."""


@dataclass(unsafe_hash=True)
class Video:
    """An open video file. It can be read to the end even if it is deleted or replaced meanwhile."""

    key: tuple[int, ...]  # device, inode, size and time of change
    path: Path = field(compare=False)
    file: int = field(compare=False)
    deadline: float = field(compare=False)
    most: int = field(compare=False, default=0)  # pixels of a frame, at most
    stream: str = "0:V:0"  # ffmpeg's name of the stream to decode; V: without attached pictures

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.key[2]


@contextmanager
def opened(path: Path) -> Iterator[Video]:
    """Opens a video file. Raises DataError if it is missing, unreadable, or not a regular file."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise DataError(not_found(path)) from None
    except (OSError, ValueError) as error:  # ValueError: no file can have this name
        reason = getattr(error, "strerror", None) or "this is no name of a file"
        raise DataError(f"{str(path)!r} cannot be opened ({reason}): delete its rows.") from None
    try:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise DataError(f"{path} is a folder, pipe or device, not a video file: delete its rows.")
        if (declared := _declared_size(os.read(file, 2**16))) > about.st_size + 1024:
            what = f"it declares {declared:,} bytes and holds {about.st_size:,}"
            raise DataError(f"{path} is truncated, {what}: copy or download it again.")
        key = about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns
        yield Video(key, path, file, time.monotonic() + time_limit + 300 * about.st_size / 2**20)
    finally:
        os.close(file)


def _declared_size(head: bytes) -> int:
    """The bytes that the header of an AVI or ASF (WMV) file declares; 0 if it declares none."""
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        size = int.from_bytes(head[4:8], "little") + 8
        return size if size < 2**31 else 0
    at = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))  # ASF's File Properties
    return int.from_bytes(head[at + 40 : at + 48], "little") if at >= 0 and not head[at + 88] & 1 else 0


def _encrypted(video: Video) -> bool:
    """Whether an MP4 file has an encrypted video track: its sample entry is named so."""
    found = False
    for place in (0, max(0, video.size - 2**20)):
        os.lseek(video.file, place, os.SEEK_SET)
        part = os.read(video.file, 2**20)
        found |= b"encv" in part or b"drmi" in part
    return found


def check_ffmpeg() -> str:
    """The path of ffmpeg. Raises DataError if it cannot be run or is too old."""
    try:
        path = imageio_ffmpeg.get_ffmpeg_exe()
        version = _version(path)
    except (RuntimeError, OSError, subprocess.CalledProcessError):
        raise DataError("no working ffmpeg: pip install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE.") from None
    number = re.match(r"n?(\d+)\.", version)
    if number and int(number[1]) < LEAST_FFMPEG:
        advice = f"set IMAGEIO_FFMPEG_EXE to version {LEAST_FFMPEG} or later, or unset it."
        raise DataError(f"{path} is ffmpeg {version}, which is too old: {advice}")
    return path


@functools.cache
def _version(path: str) -> str:
    ran = subprocess.run([path, "-version"], capture_output=True, check=True, stdin=subprocess.DEVNULL)
    return (ran.stdout.decode(errors="replace").split() + [""] * 3)[2]  # "ffmpeg version 9.0.2-static ..."


def check_shape(path: Path, height: int, width: int) -> None:
    """Raises DataError for a frame whose one side is more than LONGEST times the other."""
    if max(height, width) > LONGEST * min(height, width):
        what = f"is {width} x {height} pixels, a side is more than {LONGEST} times the other"
        raise DataError(f"{path} {what}: crop it or delete its rows.")


class Run:
    """A run of ffmpeg on an open video, as a context: it never outlives the block.

    options: those of the output, to pipe:1. seek: where to start, about, in seconds; its frames keep their
    times. sieved: a change of the frame size ends the run, since filters then count from zero again. dropped:
    an expression of the packets, by their number n, that are not decoded."""

    def __init__(
        self,
        video: Video,
        options: Sequence[str],
        seek: float | None = None,
        sieved: bool = False,
        dropped: str = "",
    ):
        command = [check_ffmpeg(), "-nostdin", "-hide_banner", "-nostats", "-v", "repeat+verbose"]
        command += ["-protocol_whitelist", "fd", "-format_whitelist", FORMATS]
        command += ["-threads", "1", "-max_pixels", str(video.most)]
        if seek is not None:
            command += ["-noaccurate_seek", "-copyts", "-start_at_zero", "-ss", f"{seek:.6f}"]
        if dropped:
            command += ["-bsf:v", f"noise=drop='{dropped}'"]
        os.lseek(video.file, 0, os.SEEK_SET)
        pipes = dict(stdin=video.file, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.video, self.expired = video, False
        self.process = process = subprocess.Popen([*command, "-i", "fd:", *options], **pipes)
        _running.add(process)
        self.log = Log(process.kill if sieved else lambda: None)
        lines = iter(lambda: process.stderr.readline(2**14), b"")
        self.reader = threading.Thread(target=self.log.read, args=(lines,), daemon=True)
        self.timer = threading.Timer(max(0.0, video.deadline - time.monotonic()), self._expire)
        self.timer.daemon = True
        self.timer.start()
        self.reader.start()
        if _stopping.is_set():
            process.kill()

    def _expire(self) -> None:
        self.expired = True
        self.process.kill()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.wait()
        _running.discard(self.process)
        self.process.stdout.close()
        self.process.stderr.close()

    def wait(self) -> None:
        """Waits for the end of ffmpeg and its log."""
        self.process.wait()
        self.timer.cancel()
        self.reader.join()

    def frames(self, sieve: Collection[int] | None = None) -> Iterator[tuple[Shown, Frame | None]]:
        """The frames as ffmpeg decodes them; those whose number is not in `sieve` come without pixels."""
        number = 0
        while (shown := self.log.shown.get()) is not None:
            pixels = None
            if sieve is None or number in sieve:
                check_shape(self.video.path, shown.height, shown.width)
                pixels = np.empty((shown.height, shown.width, 3), np.uint8)
                if self.process.stdout.readinto(pixels.data.cast("B")) < pixels.nbytes:
                    break
            yield shown, pixels
            number += 1

    def finish(self) -> None:
        """Waits for the end of a run. Raises DataError if it tells that the file is unfit."""
        self.wait()
        log, path, code = self.log, self.video.path, self.process.returncode
        again = "copy or download it again"
        bad = log.errors - log.first + log.corrupt
        if _stopping.is_set():
            raise DataError(f"{path} was not read: stopped.")
        if self.expired:
            seconds = f"{time_limit:g} s and 300 s for each MiB"
            what = f"{path} takes longer to decode than {seconds}"
            raise DataError(f"{what}: raise --time-limit, or replace it.")
        if log.too_large:
            raise TooLarge(log.too_large)
        if (stream := self._default()) is not None:
            raise OtherStream(stream)
        if code < 0 and "changed" not in log.marks:
            raise DataError(f"{path} makes ffmpeg crash (signal {-code}): replace it or delete its rows.")
        if "cut" in log.marks:
            raise DataError(f"{path} is truncated: {again}.")
        if (log.errors or log.corrupt or code) and ("encrypted" in log.marks or _encrypted(self.video)):
            raise DataError(f"{path} is encrypted (DRM): replace it or delete its rows.")
        if bad > DAMAGED * log.packets:
            raise DataError(f"{path} is damaged, {bad} of {log.packets} frames cannot be decoded: {again}.")
        if log.first > log.packets / 2:
            what = f"the first {log.first} of {log.packets} frames cannot be decoded"
            raise DataError(f"{path} is damaged, {what}: {again}.")
        if code or "no video" in log.marks:
            what = "empty, broken or not a video file"
            if log.format:
                what = "broken, or of an unknown codec" if log.streams else "only sound, or a cover picture"
            raise DataError(f"{path} holds no readable video ({what}): replace it or delete its rows.")
        if bad:
            what = f"{bad} of {log.packets} frames are damaged and shown as ffmpeg repairs them"
            warnings.warn(f"{path}: {what}.", stacklevel=2)

    def _default(self) -> int | None:
        """The number of the first default video stream, if the one in use is not a default."""
        default = [number for number, text in self.log.streams.items() if "(default)" in text]
        first = self.video.stream == Video.stream and default and self.log.used not in default
        return default[0] if first else None


@contextmanager
def stopped() -> Iterator[None]:
    """A block in which no ffmpeg of this process runs or starts: what reads a video ends with a DataError."""
    _stopping.set()
    try:
        for process in list(_running):
            process.kill()
        yield
    finally:
        _stopping.clear()
