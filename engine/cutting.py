"""Cuts a part out of a video file by ffmpeg, without encoding it again."""

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

from engine import ffmpeg
from engine.files import DataError, first_line, writing

# Formats that ffmpeg writes under the same name; a part of any other file becomes a .mkv.
WRITTEN = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".webm": "webm", ".mkv": "matroska", ".avi": "avi"}
WRITTEN |= {".ts": "mpegts", ".m2ts": "mpegts", ".mts": "mpegts"}


def suffix_of(source: Path, start: float, end: float | None) -> str:
    """The suffix of the file that `cut` makes."""
    whole = start == 0 and end is None
    return source.suffix if whole or source.suffix.lower() in WRITTEN else ".mkv"


def cut(source: Path, target: Path, start: float, end: float | None) -> None:
    """Writes the part of a video from start to end (seconds) into a new file; the whole file is copied.

    Picture and sound are copied as they are. They can only begin at a key frame, so the new file may hold
    some seconds more before the start; in .mp4 and .mov, players skip them. The file appears when it is
    complete. Raises DataError if it exists, if it cannot be written, and if ffmpeg cannot cut the source."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with ffmpeg.opened(source) as video, writing(target, DataError, "name another folder with --export."):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            raise DataError(f"{target} is there already: name another folder with --export.")
        try:
            if start == 0 and end is None:
                shutil.copyfile(source, part)
            else:
                _copy(video, part, WRITTEN[target.suffix.lower()], start, end)
            _appear(part, target)
        finally:
            part.unlink(missing_ok=True)


def _copy(video: ffmpeg.Video, part: Path, form: str, start: float, end: float | None) -> None:
    command = [ffmpeg.check_ffmpeg(), "-nostdin", "-hide_banner", "-v", "error", "-y"]
    command += ["-protocol_whitelist", "fd", "-format_whitelist", ffmpeg.FORMATS, "-ss", f"{start:.6f}"]
    command += ["-i", "fd:", *([] if end is None else ["-t", f"{end - start:.6f}"])]
    command += ["-map", "0:V:0", "-map", "0:a?", "-c", "copy", "-f", form, f"file:{part}"]
    os.lseek(video.file, 0, os.SEEK_SET)
    left = max(1.0, video.deadline - time.monotonic())
    try:
        ran = subprocess.run(command, stdin=video.file, capture_output=True, timeout=left)
    except subprocess.TimeoutExpired:
        raise DataError(f"{video.path} takes longer than {left:.0f} s to cut: raise --time-limit.") from None
    if ran.returncode or not part.stat().st_size:
        reason = first_line(ValueError(ran.stderr.decode(errors="replace")))
        raise DataError(f"{video.path} cannot be cut ({reason}): cut it with another program.")


def _appear(part: Path, target: Path) -> None:
    """Gives a complete file its name, unless another one has it."""
    with contextlib.suppress(OSError):
        os.link(part, target)  # atomic, and fails if the name is taken
        return
    if target.exists():
        raise DataError(f"{target} is there already: name another folder with --export.")
    part.replace(target)  # a file system without links
