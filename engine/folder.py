"""The videos below a folder: which are there, which are left out, and what cannot be reached now."""

import errno
import functools
import heapq
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from engine.files import VIDEO_SUFFIXES, DataError

# Names of files and folders that are left out: hidden ones, and the trash, snapshots and thumbnails of
# desktops, phones and network disks. A folder that holds a file .nomedia is left out too, as on Android.
PRIVATE = re.compile(
    r"\..*|[@#$~_]?(trash(es|bin|can)?|recycle[rd]?([ ._-]?bin)?|thumb(s|nails?)?)(-\d+)?"
    r"|[@#$~](.*-)?snapshots?|@eadir|@syno.*|@tmp|files_(trashbin|versions)"
    r"|system volume information|lost\+found|found\.\d{3}",
    re.IGNORECASE | re.DOTALL,
)


@dataclass
class Folder:
    """What `scan` found. Names are relative to the folder, with "/"."""

    root: Path
    videos: dict[str, os.stat_result] = field(default_factory=dict)
    mounts: dict[str, str] = field(default_factory=dict)  # of each video: the mount point of its disk
    left_out: int = 0  # videos in hidden, trash and thumbnail folders
    outside: int = 0  # videos that are reached by a link out of the folder
    dangling: dict[str, str] = field(default_factory=dict)  # links whose target is not there, with the target
    unreadable: dict[str, str] = field(default_factory=dict)  # folders and files that cannot be read, and why

    def away(self, file: str, mount: str | None) -> str | None:
        """The link, folder or disk because of which `scan` could not see a file, or None if the file is gone.

        mount: the mount point of its disk when the file was last seen; None if it is not known."""
        if file in self.videos:
            return None
        folders = ["/".join(file.split("/")[:n]) for n in range(file.count("/") + 2)]  # "", "a", "a/b.mp4"
        for name in folders:
            if name in self.dangling or name in self.unreadable:
                return name
        if mount is None:
            return None if self.videos else ""
        nearest = next(name for name in reversed(folders) if os.path.isdir(self.root / name))
        real = os.path.realpath(self.root / nearest)
        unmounted = not os.path.ismount(mount) and _inside(real, mount)
        return nearest if unmounted else None

    def why(self, name: str) -> str:
        """What is wrong with a name that `away` returned, as the start of a sentence."""
        if name in self.dangling:
            return f"{self.root / name} is a link to {self.dangling[name]}, which is not there"
        if name in self.unreadable:
            return f"{self.root / name} cannot be read ({self.unreadable[name]})"
        return f"{self.root / name} is empty: its disk is not mounted"

    def notes(self) -> list[str]:
        """What was taken or left out, to print."""
        where = "in hidden, trash or thumbnail folders (--hidden takes them)"
        left_out = [f"left out: {self.left_out} videos {where}"] * bool(self.left_out)
        outside = f"note: links lead out of {self.root} to {self.outside} videos of the library"
        return left_out + [outside] * bool(self.outside)

    def warnings(self, kept: dict[str, int]) -> list[str]:
        """What cannot be reached. kept: the number of files that are kept in the library, by `away`."""
        names = {**self.unreadable, **self.dangling, **kept}
        then = {name: f"{kept[name]} files of the library are kept" for name in kept}
        return [f"{self.why(name)}: {then.get(name, 'it is passed over')}." for name in names]

    def nothing(self) -> str:
        """The message for a folder without a video."""
        reasons = [self.why(name) for name in (*self.unreadable, *self.dangling)]
        reason = f": {reasons[0]}" if reasons else f" ({', '.join(sorted(VIDEO_SUFFIXES))})"
        hidden = f", or add --hidden: it takes {self.left_out} more" if self.left_out else ""
        return f"{self.root} holds no video{reason}: name another folder{hidden}."


def is_video(name: str) -> bool:
    """Whether a name is that of a video: by its suffix. A trailing dot counts as one (DiDeMo)."""
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES or name.endswith(".")


def scan(root: Path, hidden: bool = False) -> Folder:
    """The videos below a folder. Follows links; visits each folder once, if possible not through a link.

    hidden: also take what PRIVATE names. Raises DataError if the folder itself cannot be read."""
    found, top, seen = Folder(root), os.path.realpath(root), set()
    waiting = [(False, False, "", top)]  # (left out, behind a link, name, real path), visited in this order
    mount_point = functools.cache(_mount_point)
    while waiting:
        private, linked, folder, place = heapq.heappop(waiting)
        if place in seen:
            continue
        seen.add(place)
        try:
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
            nomedia = bool(folder) and any(entry.name == ".nomedia" for entry in entries)
            for entry in entries:
                name = f"{folder}/{entry.name}".lstrip("/")
                apart = private or (not hidden and (nomedia or bool(PRIVATE.fullmatch(entry.name))))
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(place, entry.name)
                info = None if entry.name.startswith("._") else _status(found, name, entry, apart)
                if info is None:
                    continue
                if stat.S_ISDIR(info.st_mode):
                    heapq.heappush(waiting, (apart, linked or entry.is_symlink(), name, real))
                elif is_video(name) and apart:
                    found.left_out += 1
                elif is_video(name) and not stat.S_ISREG(info.st_mode):
                    found.unreadable[name] = "it is a pipe, a socket or a device"
                elif is_video(name):
                    found.videos[name], found.mounts[name] = info, mount_point(os.path.dirname(real))
                    found.outside += not _inside(real, top)
        except OSError as error:
            if not folder:
                raise DataError(f"{root} cannot be read ({error.strerror}): name another folder.") from None
            if not private and not isinstance(error, FileNotFoundError):  # else it was removed meanwhile
                found.unreadable[folder] = str(error.strerror)
    return found


def _status(found: Folder, name: str, entry: os.DirEntry, apart: bool) -> os.stat_result | None:
    """The status of a file or folder. None, and a note in `found`, if it cannot be reached.

    Raises PermissionError if nothing in the folder of `entry` can be reached."""
    try:
        return os.stat(entry.path)
    except OSError as error:
        if apart or (not entry.is_symlink() and isinstance(error, FileNotFoundError)):
            return None
        if entry.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            found.dangling[name] = os.readlink(entry.path)
        elif isinstance(error, PermissionError) and not entry.is_symlink():
            raise
        else:
            found.unreadable[name] = str(error.strerror)
        return None


def _mount_point(folder: str) -> str:
    """The mount point of the disk that a folder is on."""
    while not os.path.ismount(folder):
        folder = os.path.dirname(folder)
    return folder


def _inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
