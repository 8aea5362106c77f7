"""Dividing work among processes by a hash of each name: which part is this process's own (--part 3/16)."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from engine.datasets import Clip
from engine.files import DataError


@dataclass(frozen=True)
class Part:
    """One of `count` parts; `number` counts from 1. The default is everything."""

    number: int = 1
    count: int = 1

    def has(self, name: str) -> bool:
        """Whether a name belongs to this part. It belongs to one of them, on every machine the same."""
        digest = hashlib.sha256(os.fsencode(name)).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.number - 1

    def of(self, names: Iterable[str]) -> list[str]:
        """The names that belong to this part."""
        return [name for name in names if self.has(name)]

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def part_of(flag: str | None, environment: Mapping[str, str] = os.environ) -> Part:
    """The part that --part names; without it, that of a Slurm array job or of torchrun (RANK and WORLD_SIZE).

    Raises DataError for anything but N/COUNT with N from 1 to COUNT."""
    numbers = {name: int(text) for name, text in environment.items() if re.fullmatch(r"[0-9]{1,9}", text)}
    if flag is not None:
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", flag, re.ASCII)
        part = Part(int(found[1]), int(found[2])) if found else Part(0, 0)
    elif {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"} <= numbers.keys():
        least, step = (numbers.get(f"SLURM_ARRAY_TASK_{name}", d) for name, d in (("MIN", 0), ("STEP", 1)))
        number = (numbers["SLURM_ARRAY_TASK_ID"] - least) // max(1, step) + 1
        part = Part(number, numbers["SLURM_ARRAY_TASK_COUNT"])
    elif {"RANK", "WORLD_SIZE"} <= numbers.keys():
        part = Part(numbers["RANK"] + 1, numbers["WORLD_SIZE"])
    else:
        return Part()
    if not 1 <= part.number <= part.count:
        what = f"--part {flag}" if flag is not None else f"the environment's part {part}"
        raise DataError(f"{what} is no part: give the number of the part and of all parts, as in 3/16.")
    return part


def own_part(clips: Sequence[Clip], flag: str | None) -> list[Clip]:
    """The clips whose ids belong to the part of `part_of`; prints how many, unless there is one part."""
    part = part_of(flag)
    own = [clip for clip in clips if part.has(clip.id)]
    if part.count > 1:
        print(f"part {part}: {len(own)} of {len(clips)} clips")
    return own
