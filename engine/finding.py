"""The files of a data set, found by name anywhere below a folder."""

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import TypeVar

from engine.files import DataError, files_below, stem
from engine.tables import read_json, read_lines, read_rows

Value = TypeVar("Value")


def grouped(pairs: Iterable[tuple[str, Value]]) -> dict[str, list[Value]]:
    """All values of each name, in order."""
    values: dict[str, list[Value]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    return values


def normal(name: str) -> str:
    """A name as it is compared: in the Unicode form NFC (a Mac writes NFD), without blanks around it."""
    return unicodedata.normalize("NFC", name).strip()


class Files:
    """The files of a data set, found by name anywhere below its folder(s).

    An unpacked archive can stay as it is, and a video may have another extension than its annotation says.
    annotations, videos: folders (videos: default the same one). needs: what to say if a file is missing."""

    def __init__(self, annotations: Path, videos: Path | None = None, needs: str = ""):
        self.annotations, self.videos, self.needs = annotations, videos or annotations, needs
        self._annotations = self._by_name(annotations)
        self._videos = self._by_name(videos) if videos else self._annotations
        self._stems: dict[str, list[Path]] = {}
        for name, paths in self._videos.items():
            self._stems.setdefault(stem(name).strip(), []).extend(paths)

    def _by_name(self, root: Path) -> dict[str, list[Path]]:
        if not root.is_dir():
            raise DataError(f"{root} is not a folder: {self.needs}")
        return grouped((normal(path.name), path) for path in files_below(root))

    def has(self, name: str) -> bool:
        """Whether an annotation file of this name exists."""
        return name in self._annotations

    def annotation(self, name: str) -> Path:
        """The path of the annotation file of this name. Raises DataError if there is none."""
        if name not in self._annotations:
            raise DataError(f"{name} not found below {self.annotations}: {self.needs}")
        return self._annotations[name][0]

    def lines(self, name: str) -> list[str]:
        """`read_lines` of an annotation file."""
        return read_lines(self.annotation(name))

    def names(self, name: str) -> list[str]:
        """The lines of a list of videos, without blanks around them."""
        return [line.strip() for line in self.lines(name)]

    def rows(self, name: str, *columns: str) -> list[tuple[int, dict[str, str]]]:
        """`read_rows` of an annotation file."""
        return read_rows(self.annotation(name), *columns)

    def json(self, name: str):
        """The content of a JSON annotation file. Raises DataError if it is not valid JSON."""
        return read_json(self.annotation(name))

    def video(self, name: str, folder: str = "") -> Path:
        """The path of a video: as written, else in another folder, else with another extension too.

        A name with folders fits a path if one of them ends with the other. folder: where the video should be,
        if it may be anywhere. If there is no such video, returns where it should be, or a link to a file that
        is missing. Raises DataError if several files fit."""
        expected, wanted = self.videos / folder / name, PurePath(normal(name))
        if os.path.isfile(expected):
            return expected
        same = self._videos.get(wanted.name, []), self._stems.get(stem(wanted.name).strip(), [])
        same = [[path for path in paths if self._fits(path, wanted.parent.parts)] for paths in same]
        found = next(filter(None, ([p for p in paths if os.path.isfile(p)] for paths in same)), [])
        if len(found) > 1:
            raise DataError(f"{name} can be {found[0]} or {found[1]}: keep one of them, or name its folder.")
        return [*found, *same[0], *same[1], expected][0]

    def _fits(self, path: Path, folders: tuple[str, ...]) -> bool:
        own = PurePath(normal(str(path.parent.relative_to(self.videos)))).parts
        length = min(len(own), len(folders))
        return own[len(own) - length :] == folders[len(folders) - length :]

    def is_video(self, name: str) -> bool:
        """Whether there is a video of this name, or several."""
        try:
            return bool(name) and os.path.isfile(self.video(name))
        except DataError:
            return True
