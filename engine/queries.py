"""What is asked of a library, and what is found: weighted texts and pictures, filters, near-duplicates.

The score of a clip is a sum over what is asked for: its weight times the exact score of `evaluate.scores` for
a text, times `similarity` for a picture or another clip.
"""

import datetime
import io
import math
import os
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from engine.files import DataError

NOT = -0.5  # weight of --not; on the built-in clips weights from -0.25 to -0.5 were best
SAME = 0.3  # two clips whose small frames differ by less are near-duplicates; see `difference`
SIDE, CONTRAST = 8, 8.0  # pixels a side of such a small frame; the least contrast of one, of 255
PARTS = 20  # of a query, at most
LOW = 0.2  # "nothing fits well": this share of random captions, at most, has no better clip

Small = Float[np.ndarray, "frames 8 8 3"]


@dataclass(frozen=True)
class Part:
    """One thing that is asked for: a text, or frames (of a picture or a clip) that clips should look like."""

    weight: float
    text: str = ""
    frames: Float[Tensor, "own dim"] | None = None


@dataclass(frozen=True)
class Query:
    """What to look for, and where. newer, older: seconds since 1970 of a file's last change."""

    parts: tuple[Part, ...]
    inside: str = ""  # a folder below the library's; "": everywhere
    newer: float = -math.inf
    older: float = math.inf
    without: frozenset[str] = frozenset()  # ids of clips that are not shown
    all: bool = False  # near-duplicates as hits of their own

    @property
    def texts(self) -> list[Part]:
        """The parts that are texts."""
        return [part for part in self.parts if part.frames is None]

    @property
    def filtered(self) -> bool:
        """Whether only some files may answer."""
        return bool(self.inside) or self.newer > -math.inf or self.older < math.inf

    @property
    def plain(self) -> str | None:
        """The text, if one text is all that is asked for."""
        return self.parts[0].text if len(self.texts) == len(self.parts) == 1 and not self.filtered else None


@dataclass(frozen=True)
class Hit:
    """A clip that a query found. start, end: seconds into the file; end is None for the end of the file."""

    rank: int
    score: float
    id: str
    file: str
    start: float
    end: float | None
    attention: list[float]  # the weight of each frame for the query; sums to one
    radius: float | None  # mean radius of the text mass; None for a model or a query without one
    best: int = 0  # the number of the frame that fits best, from 0
    time: float | None = None  # its time in the file, in seconds; None if the file's length is unknown
    copies: list[dict] = field(default_factory=list)  # near-duplicates: file, start, end, score of each


# ------------------------------------------------------------------------------------------- what is asked


def build_query(
    text: str,
    also: Sequence[tuple[float, str]] = (),
    unlike: Sequence[str] = (),
    pictures: Sequence[Float[Tensor, "_ dim"]] = (),
    inside: str = "",
    newer: str | None = None,
    older: str | None = None,
    without: frozenset[str] = frozenset(),
    all: bool = False,
) -> Query:
    """A query of what a user gives. Text and pictures have weight 1, and `unlike` has NOT.

    Raises DataError for a weight or date that is none, and if nothing is asked for."""
    parts = [Part(1.0, text)] * bool(text.strip()) + [Part(1.0, frames=frames) for frames in pictures]
    for weight, words in also:
        if not math.isfinite(weight) or weight == 0:
            raise DataError(
                f"the weight of {words!r} is {weight:g}: give a number other than 0, such as 0.5."
            )
        parts.append(Part(weight, words))
    parts += [Part(NOT, words) for words in unlike]
    if not any(part.weight > 0 for part in parts):
        only = (
            "with --not or a negative weight alone nothing is looked for" if parts else "the query is empty"
        )
        raise DataError(f"{only}: describe what to look for.")
    if not all_words(parts):
        raise DataError("the query has an empty part: describe it, or leave it out.")
    if len(parts) > PARTS:
        raise DataError(f"the query has {len(parts)} parts: use at most {PARTS}.")
    since = -math.inf if newer is None else timestamp(newer)
    until = math.inf if older is None else timestamp(older)
    if since >= until:
        raise DataError(f"no file is newer than {newer} and older than {older}: give a later date to older.")
    return Query(tuple(parts), inside, since, until, without, all)


def all_words(parts: Sequence[Part]) -> bool:
    """Whether every part that is a text has words."""
    return all(part.frames is not None or part.text.strip() for part in parts)


def timestamp(date: str) -> float:
    """A date or time of day of ISO 8601, in this machine's time zone, as seconds since 1970.

    Raises DataError."""
    try:
        return datetime.datetime.fromisoformat(date.strip()).timestamp()
    except (ValueError, OverflowError, OSError):
        raise DataError(f"{date!r} is not a date: write it as 2024-01-31 or 2024-01-31T18:30.") from None


def split_time(name: str) -> tuple[str, float | None]:
    """CLIP@12.5 as ("CLIP", 12.5). Without a time, and where "@" is part of the name: (name, None)."""
    file, at, time = name.rpartition("@")
    return (
        (file, float(time)) if at and file and re.fullmatch(r"\d+(\.\d*)?", time, re.ASCII) else (name, None)
    )


def eligible(files: dict[str, dict], folder: str, query: Query) -> list[str]:
    """The files of a library that may answer a query. Raises DataError if there are none.

    files: rows by name, as Library.files returns them; folder: the library's."""
    inside = Path(query.inside or ".")
    if inside.is_absolute():
        try:
            inside = Path(os.path.realpath(inside)).relative_to(folder)
        except ValueError:
            raise DataError(f"{query.inside} is not in the folder of the library.") from None
    start = unicodedata.normalize("NFC", os.path.normpath(inside)) + "/"
    below = (
        files if start == "./" else [f for f in files if unicodedata.normalize("NFC", f).startswith(start)]
    )
    if not below:
        raise DataError(f"the library has no file in {query.inside!r}: name a folder below the library's.")
    found = [file for file in below if query.newer <= changed(files[file]) < query.older]
    if not found:
        raise DataError("no file of the library has such a date: choose another one.")
    return found


def changed(row: dict) -> float:
    """When a file was last changed, in seconds since 1970, by its row in the library; NaN: unfinished."""
    stamp = row["stamp"].split()  # size, time in ns, how it is cut
    return int(stamp[1]) / 1e9 if len(stamp) > 1 else math.nan


# -------------------------------------------------------------------------------------------- what is found


def similarity(
    own: Float[Tensor, "own dim"], frames: Float[Tensor, "clips frames dim"]
) -> Float[Tensor, "clips own frames"]:
    """The cosine of each frame of a picture or clip with each frame of the clips of a library.

    The score is the largest one for each own frame, and the mean over the own frames."""
    return torch.einsum("od,cfd->cof", F.normalize(own, dim=-1), F.normalize(frames, dim=-1))


def small_frames(jpeg: bytes, count: int) -> Small:
    """The `count` frames of a filmstrip, 8 x 8 pixels each."""
    with Image.open(io.BytesIO(jpeg)) as strip:
        strip.draft("RGB", (strip.width // 8, strip.height // 8))  # decodes eighths, which is fast
        strip, width = strip.convert("RGB"), strip.width / count
        boxes = [(n * width, 0, (n + 1) * width, strip.height) for n in range(count)]
        small = [strip.resize((SIDE, SIDE), Image.Resampling.BOX, box=box) for box in boxes]
    return np.stack([np.asarray(frame, np.float32) for frame in small])


def difference(one: Small, other: Small) -> float:
    """How much two clips differ, mean over frames: the root mean square of the difference of pixels, relative
    to the contrast of the first clip's frame (its standard deviation; at least CONTRAST)."""
    apart = np.sqrt(np.square(one - other).mean(axis=(1, 2, 3)))
    return float((apart / one.std(axis=(1, 2)).mean(axis=-1).clip(CONTRAST)).mean())


def fold(count: int, k: int, small: Callable[[int], Small | None]) -> list[list[int]]:
    """Ranked clips as k groups: a clip and its near-duplicates of a lower rank.

    count: of the clips, which have the numbers 0, 1, ... by rank. small(n): the small frames of one; None is
    like no other."""
    groups: list[list[int]] = []
    for n in range(count):
        same = (group for group in groups if _near(small(group[0]), small(n)))
        if (group := next(same, None)) is not None:
            group.append(n)
        elif len(groups) == k:
            break
        else:
            groups.append([n])
    return groups


def _near(one: Small | None, other: Small | None) -> bool:
    return one is not None and other is not None and difference(one, other) < SAME


def unfit(score: float, best: Sequence[float]) -> str | None:
    """The note that nothing fits well, if the best score is low for this library.

    best: the best scores of random captions in it, in ascending order."""
    below = bisect_right(best, score)
    if not best or below >= LOW * len(best):
        return None
    share = f"{len(best) - below} of {len(best)} random captions find a better one"
    return f"nothing fits well: the best clip has {score:.3f}, and {share}."
