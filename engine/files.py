"""The two errors shown to users, names of files, and the one atomic write. Standard library only."""

import errno
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PICTURE_SUFFIXES = {f".{name}" for name in "jpg jpeg png apng webp avif bmp".split()}
VIDEO_SUFFIXES = {
    f".{name}" for name in "mp4 avi mkv webm mov m4v mpg mpeg wmv 3gp 3g2 mts m2ts flv ogv gif".split()
}


class DataError(ValueError):
    """The user's data cannot be used. The message says what is wrong, in which file, and what to do."""


class ModelError(ValueError):
    """A model cannot be built or loaded. The message says what is wrong, in which file, and what to do."""


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def stem(name: str) -> str:
    """Strips a known video or picture extension and a trailing dot; other dots are kept."""
    base, dot, suffix = name.rpartition(".")
    return (base if dot and f".{suffix.lower()}" in VIDEO_SUFFIXES | PICTURE_SUFFIXES else name).rstrip(".")


def files_below(root: Path) -> Iterator[Path]:
    """Every file below a folder, sorted in each folder. Follows links to folders; visits each folder once."""
    seen = {os.path.realpath(root)}  # links can form a cycle
    for folder, folders, names in os.walk(root, followlinks=True):
        real = {name: os.path.realpath(Path(folder, name)) for name in sorted(folders)}
        folders[:] = [name for name in real if real[name] not in seen and not seen.add(real[name])]
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("._"))  # macOS files


def not_found(path: Path) -> str:
    """The sentence for a file that is not there, or a link to one."""
    link = f" (a link to {os.readlink(path)})" if path.is_symlink() else ""
    return f"{path}{link} not found: add the file or delete its rows."


def printable(text: str) -> str:
    """The text with "?" for control characters and for bytes of a file name that are not UTF-8."""
    return re.sub(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]", "?", text).encode(errors="replace").decode()


def write_atomic(path: Path, content: bytes | Callable[[BinaryIO], object], sync: bool = True) -> None:
    """Writes a file atomically: to a temporary file beside it, synced, then renamed. Creates missing folders.

    content: the bytes, or a function that writes them to an open file. sync=False, for a cache that notices
    damage: the file may be damaged if power fails soon. Raises OSError if the file cannot be
    written; the temporary file is then removed and an older file at `path` is unchanged."""
    part = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    except RuntimeError as error:  # torch.save raises it for a full disk; the OSError is its context
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(errno.EIO, str(error).strip().split("\n")[0]) from None
    finally:
        part.unlink(missing_ok=True)  # after a rename there is none


@contextmanager
def writing(path: Path, error: type[ValueError], advice: str) -> Iterator[None]:
    """Turns an OSError in the block into `error`: one sentence with the file, the reason and the advice."""
    try:
        yield
    except OSError as reason:
        raise error(f"{path} could not be written ({reason.strerror or reason}): {advice}") from None


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files of write_atomic whose process, on this machine, no longer runs."""
    for path in folder.glob(f"*.{socket.gethostname()}.*.part"):
        try:
            os.kill(int(path.name.split(".")[-2]), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except PermissionError:  # it runs, as another user
            pass
