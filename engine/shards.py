"""Shards: append-only files of clips and their features, read by memory map while others write.

A folder holds any number of shards. A shard is written by one process, and is four files of one name:

    .journal  JSON lines: what the shard holds; then one line a commit, with the entries of its files
    .clips    a record of each clip: number in its file, start, end, place of its filmstrip, vector, scale
    .frames   the features, float16 (rows, frames, dim)
    .strips   the filmstrips, one after the other

A commit syncs the last three, then adds its line to the journal and syncs that. Only complete lines are read,
and only the rows that they name: what a killed process had begun is never seen. An entry of a file carries
its time, and the latest entry in all shards counts, so processes on any machines write into one folder
without waiting for each other.
"""

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Float32, Int, Shaped

from engine.files import DataError, writing

try:
    import fcntl
except ImportError:  # Windows: shards are never merged there
    fcntl = None

KINDS = ("journal", "clips", "frames", "strips")
ROWS = 65_536  # a shard with as many rows is not continued
SMALL, MANY = 4096, 16  # more than MANY shards of fewer than SMALL rows are merged into one
ADVICE = "make room or use another folder; what was committed before is kept."

# Of a file: time of the commit, its row (None: removed), [first, end) of its clips' rows in the shard.
Entry = tuple[int, dict | None, list[list[int]]]


def record(dim: int, frames: int) -> np.dtype:
    """The record of a clip. end: -1 for the end of the file. scale: 1 / standard deviation of each frame."""
    numbers = [("n", "<i4"), ("size", "<i4"), ("strip", "<i8"), ("start", "<f8"), ("end", "<f8")]
    return np.dtype([*numbers, ("vector", "<f4", (dim,)), ("scale", "<f4", (frames,))])


def lock(file) -> bool:
    """Locks an open file until it is closed. False if another process has locked it, or nobody can."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, AttributeError):
        return False
    return True


class Writer:
    """A new shard in a folder. holds: "model", "dim" and "frames" of its clips. Raises DataError."""

    def __init__(self, folder: Path, holds: dict):
        self.folder, self.holds, self.rows = folder, holds, 0
        self.name = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
        with self._writing():
            self._files = {kind: (folder / f"{self.name}.{kind}").open("xb", 0) for kind in KINDS}
            lock(self._files["journal"])
            self._write("journal", json.dumps(holds).encode() + b"\n")
            with contextlib.suppress(OSError):  # Windows opens no folder
                handle = os.open(folder, os.O_RDONLY)
                os.fsync(handle)  # the names of the new files
                os.close(handle)

    def _writing(self):
        return writing(self.folder / self.name, DataError, ADVICE)

    def _write(self, kind: str, content: bytes) -> None:
        while content:  # an unbuffered file may take a part of it
            content = content[self._files[kind].write(content) :]

    def add(
        self,
        clips: Shaped[np.ndarray, " clips"],  # records; size and strip are set here
        frames: Float16[np.ndarray, "clips frames dim"],
        strips: Sequence[bytes],
    ) -> list[int]:
        """Writes clips, which nobody sees before the commit. Returns their rows, [first, end]."""
        clips["size"] = [len(strip) for strip in strips]
        clips["strip"] = self._files["strips"].tell() + clips["size"].cumsum() - clips["size"]
        with self._writing():
            self._write("strips", b"".join(strips))
            self._write("frames", frames.tobytes())
            self._write("clips", clips.tobytes())
        self.rows += len(clips)
        return [self.rows - len(clips), self.rows]

    def copy(self, shard: "Shard", spans: list[list[int]]) -> list[list[int]]:
        """Adds rows of another shard. Returns their rows here."""
        strips = [[shard.strip(row) for row in range(first, end)] for first, end in spans]
        own = zip(spans, strips)
        return [self.add(shard.clips[a:b].copy(), shard.frames[a:b], strips) for (a, b), strips in own]

    def commit(self, files: dict[str, Entry]) -> None:
        """Makes the rows so far and the entries of files visible, all at once."""
        line = json.dumps({"rows": self.rows, "files": files}).encode() + b"\n"
        with self._writing():
            for kind in KINDS[1:]:
                os.fsync(self._files[kind].fileno())
            self._write("journal", line)
            os.fsync(self._files["journal"].fileno())

    def size(self) -> int:
        """The bytes of the journal."""
        return self._files["journal"].tell()

    def close(self) -> None:
        """Ends the shard."""
        for file in self._files.values():
            file.close()


class Shard:
    """What a shard holds, as far as it was read."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name, self.size, self.rows = folder, name, 0, 0  # size: bytes of journal read
        self.holds: dict = {}
        self.entries: dict[str, Entry] = {}  # the latest one here of each file
        self.clips = self.frames = self.strips = self._scales = np.empty(0)

    def path(self, kind: str) -> Path:
        """The path of one of the shard's files."""
        return self.folder / f"{self.name}.{kind}"

    def update(self) -> None:
        """Reads what was committed since the last time, and maps the rows.

        Raises DataError if it is damaged, FileNotFoundError if another process has merged it meanwhile."""
        with self.path("journal").open("rb") as file:
            file.seek(self.size)
            complete, newline, _ = file.read().rpartition(b"\n")
        try:
            for line in map(json.loads, complete.splitlines()):
                if not self.holds:
                    self.holds = line
                    continue
                self.rows = line["rows"]
                self.entries |= {file: tuple(entry) for file, entry in line["files"].items()}
                if any(end > self.rows for _, _, spans in line["files"].values() for _, end in spans):
                    raise ValueError("a file has rows that are not there")
            self.size += len(complete + newline)
            if self.rows > len(self.clips):
                dim, frames = self.holds["dim"], self.holds["frames"]
                self.clips = np.memmap(self.path("clips"), record(dim, frames), "c", shape=(self.rows,))
                self.frames = np.memmap(self.path("frames"), "<f2", "c", shape=(self.rows, frames, dim))
                end = int(self.clips["strip"][-1] + self.clips["size"][-1])
                self.strips = np.memmap(self.path("strips"), "u1", "c", shape=(end,)) if end else b""
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            path = self.path("journal")
            raise DataError(f"{path} is damaged ({error}): index into a new library.") from None

    def scales(self) -> Float32[np.ndarray, "rows frames"]:
        """1 / standard deviation of each frame, in memory of its own: the records are half a page apart."""
        if len(self._scales) < self.rows:
            self._scales = np.ascontiguousarray(self.clips["scale"])
        return self._scales

    def strip(self, row: int) -> bytes:
        """The filmstrip of a row."""
        start, size = self.clips["strip"][row], self.clips["size"][row]
        return bytes(self.strips[start : start + size])


@dataclass(frozen=True)
class State:
    """What a folder held at one time. Its clips are numbered by shard and row, without the removed ones."""

    shards: list[Shard] = field(default_factory=list)
    files: dict[str, tuple[Entry, int]] = field(default_factory=dict)  # latest entry, number of its shard
    names: list[str] = field(default_factory=list)  # files that have clips
    firsts: Int[np.ndarray, " shards"] = field(default_factory=lambda: np.zeros(0, int))  # its first clip
    rows: Int[np.ndarray, " clips"] = field(default_factory=lambda: np.zeros(0, int))  # in the clip's shard
    file_of: Int[np.ndarray, " clips"] = field(default_factory=lambda: np.zeros(0, int))  # number in `names`

    @classmethod
    def of(cls, shards: list[Shard]) -> "State":
        """The state that follows from the entries of all shards: the latest of each file counts."""
        files: dict[str, tuple[Entry, int]] = {}
        for s, shard in enumerate(shards):
            for file, entry in shard.entries.items():
                if file not in files or entry[0] >= files[file][0][0]:
                    files[file] = entry, s
        names = [file for file, ((_, row, spans), _) in files.items() if row is not None and spans]
        spans = [(files[file][1], *span, n) for n, file in enumerate(names) for span in files[file][0][2]]
        s, first, end, file = np.array(spans, int).reshape(-1, 4).T
        order = np.lexsort((first, s))
        s, first, file, length = s[order], first[order], file[order], (end - first)[order]
        before = np.cumsum(length) - length  # clips before each span
        rows = np.arange(length.sum()) + np.repeat(first - before, length)
        firsts = np.append(before, length.sum())[np.searchsorted(s, np.arange(len(shards)))]
        return cls(shards, files, names, firsts, rows, np.repeat(file, length))

    def __len__(self) -> int:
        return len(self.rows)

    def now(self) -> int:
        """The time of a new entry: later than all that are known, also where a clock was wrong."""
        return max(time.time_ns(), 1 + max((entry[0] for entry, _ in self.files.values()), default=0))

    def of_shard(self, s: int) -> slice:
        """The numbers of the clips of a shard."""
        end = self.firsts[s + 1] if s + 1 < len(self.shards) else len(self)
        return slice(int(self.firsts[s]), int(end))

    def of_file(self, file: str) -> Int[np.ndarray, " some"]:
        """The numbers of the clips of a file."""
        (_, row, spans), s = self.files.get(file, ((0, None, []), 0))
        if row is None or not spans:
            return np.zeros(0, int)
        own = self.of_shard(s)
        starts = own.start + np.searchsorted(self.rows[own], [first for first, _ in spans])
        return np.concatenate([n + np.arange(b - a) for n, (a, b) in zip(starts, spans)])

    def pieces(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Frames and their scales of all rows, also of removed clips, at most `size` rows at a time."""
        for shard in self.shards:
            scales = shard.scales()
            for first in range(0, shard.rows, size):
                yield shard.frames[first : first + size], scales[first : first + size]

    def among_pieces(self) -> Int[np.ndarray, " clips"]:
        """The place of each clip among the rows of all pieces."""
        rows = np.cumsum([0, *(shard.rows for shard in self.shards)])[:-1]
        return self.rows + np.repeat(rows, np.diff(self.firsts, append=len(self)))

    def places(self, numbers: Int[np.ndarray, " some"]) -> Iterator[tuple[np.ndarray, Shard, np.ndarray]]:
        """Where clips are, one shard at a time: their positions in `numbers`, the shard, their rows there."""
        shard = np.searchsorted(self.firsts, numbers, side="right") - 1
        for s in np.unique(shard):
            which = np.flatnonzero(shard == s)
            yield which, self.shards[s], self.rows[numbers[which]]


class Shards:
    """The shards of a folder, for reading. `state` follows what other processes commit meanwhile."""

    def __init__(self, folder: Path):
        self.folder, self._lock = folder, threading.Lock()
        self._sizes: dict[str, int] = {}  # of the journals
        self._state, self._next = State(), 0.0

    def state(self, now: bool = False) -> State:
        """The state of the folder. now: read it again even if that took long a moment ago.

        Raises DataError if a shard is damaged."""
        with self._lock:
            for _ in range(50):
                started = time.monotonic()
                if (sizes := self._journals()) == self._sizes or (started < self._next and not now):
                    return self._state
                try:
                    self._state, self._sizes = self._read(sizes), sizes
                    seconds = time.monotonic() - started
                    self._next = (
                        started + 10 * seconds if seconds > 1 else 0.0
                    )  # a tenth of the time, at most
                except FileNotFoundError:  # merged between the listing and the reading
                    self._state = State()
        raise DataError(f"{self.folder} does not stop to change: try again.")

    def changed(self) -> None:
        """Lets the next `state` read what this process has just committed."""
        self._next = 0.0

    def _journals(self) -> dict[str, int]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.folder) as found:
            sizes = {one.name[:-8]: one.stat().st_size for one in found if one.name.endswith(".journal")}
            return {name: sizes[name] for name in sorted(sizes)}
        return {}

    def _read(self, sizes: dict[str, int]) -> State:
        known = {shard.name: shard for shard in self._state.shards}
        shards = [known.get(name) or Shard(self.folder, name) for name in sizes]
        for shard in shards:
            if sizes[shard.name] > shard.size:
                shard.update()
        if len({json.dumps(shard.holds, sort_keys=True) for shard in shards if shard.rows}) > 1:
            raise DataError(f"{self.folder} holds clips of several models: index into a new library.")
        return State.of(shards)

    def merge(self) -> None:
        """Rewrites shards of which more than half was removed, and many small ones; deletes the old ones.

        A shard that a process may still write to stays as it is."""
        state = self.state(now=True)
        with contextlib.ExitStack() as locks:
            old, small = [], []
            for s, shard in enumerate(state.shards):
                try:
                    journal = locks.enter_context(shard.path("journal").open("r+b"))
                except FileNotFoundError:  # another process merges too
                    return
                if shard.entries and lock(journal) and os.fstat(journal.fileno()).st_size == shard.size:
                    live = len(state.rows[state.of_shard(s)])
                    (old if 2 * live < shard.rows else small if shard.rows < SMALL else []).append(s)
            if old or len(small) > MANY:
                self._rewrite(state, sorted(old + (small if len(small) > MANY else [])))
        for path in self.folder.glob("*.frames"):
            if not path.with_suffix(".journal").exists():  # a killed process was deleting it
                _delete(path)

    def _rewrite(self, state: State, old: list[int]) -> None:
        """Copies what counts of some shards to a new one, with the times of its entries; deletes them."""
        kept = [shard for s, shard in enumerate(state.shards) if s not in old]
        elsewhere = {file for shard in kept for file in shard.entries}
        counts = [(file, entry, s) for file, (entry, s) in state.files.items() if s in {*old}]
        counts = [(file, e, s) for file, e, s in counts if e[1] is not None or file in elsewhere]
        if counts:
            holds = max((state.shards[s] for s in old), key=lambda shard: shard.rows > 0).holds
            new = Writer(self.folder, holds)
            moved = {f: (time, row, new.copy(state.shards[s], spans)) for f, (time, row, spans), s in counts}
            new.commit(moved)
            new.close()
        for s in old:
            _delete(state.shards[s].path("journal"))


def _delete(journal: Path) -> None:
    """Deletes a shard, its journal first."""
    for kind in (*KINDS, "sent"):
        journal.with_suffix(f".{kind}").unlink(missing_ok=True)
