"""A library of encoded clips: shards in a folder, and for a large library vectors in a Milvus server.

Everything that search.py stores is written and read here.
"""

import hashlib
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from engine.backbone import fingerprint
from engine.files import DataError, ModelError, write_atomic, writing
from engine.milvus import Milvus
from engine.shards import ADVICE, ROWS, Shards, State, Writer, lock, record
from model import TMASS, MeanPool, XPool

OTHER = "name another one with --library"
CREATE = f"create it with python search.py index FOLDER, or {OTHER}"
AGAIN = f"python search.py index FOLDER builds a new one: delete the old one first, or {OTHER}"

Rows = tuple[list[dict], Float[Tensor, "clips frames dim"]]  # {"id", "start", "end"} of clips; their features


def span(start: float, end: float | None) -> str:
    """The part of a file that a clip covers, to print: "whole file", "10-20 s" or "20 s-end"."""
    if end is None:
        return f"{round(start, 1):g} s-end" if start else "whole file"
    return f"{round(start, 1):g}-{round(end, 1):g} s"


def stamp(file: Path | os.stat_result, cut: str) -> str:
    """Size and modification time of a file, and how it is cut. A file with a new stamp is read again."""
    status = file.stat() if isinstance(file, Path) else file
    return f"{status.st_size} {status.st_mtime_ns} {cut}"


def filmstrip(frames: Sequence[UInt8[np.ndarray, "h w 3"]], height: int = 72, most: int = 48_000) -> bytes:
    """The frames side by side, as one JPEG of at most `most` bytes."""
    width = min(max(frames[0].shape[1] * height // frames[0].shape[0], height // 4), 5 * height // 2)
    strip = Image.new("RGB", (width * len(frames), height))
    for n, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC), (n * width, 0))
    for quality in (80, 60, 40, 20, 5):
        jpeg = io.BytesIO()
        strip.save(jpeg, "JPEG", quality=quality)
        if jpeg.tell() <= most:
            return jpeg.getvalue()
    return filmstrip(frames, height // 2, most)


def identity(model: TMASS) -> str:
    """A hash of all weights, and T'. A library works only with the model that encoded its clips."""
    return f"{fingerprint(model)}-{model.arguments['num_frames']}"


@torch.no_grad()
def overall(model: TMASS, frames: Float[Tensor, "videos frames dim"]) -> Float[Tensor, "videos dim"]:
    """One vector of length 1 per video, the same for every text: what the shortlist compares with t.

    XPool: v with equal attention to all frames, a_i = 1 / T'. Unlike the mean frame, it lies in the space of
    the texts. MeanPool: its v. Any other psi: v for the mean frame of the video in place of the text."""
    psi = model.fusion
    if type(psi) is XPool:
        o = psi.norm2(psi.out(psi.value(psi.norm1(frames).mean(dim=1))))
        video = psi.norm3(o + psi.linear(o))
    elif type(psi) is MeanPool:
        video = psi(frames[:1, 0], frames)[0]
    else:
        video = torch.cat([psi(one.mean(dim=1), one)[0] for one in frames.split(1)])
    return F.normalize(video, dim=-1)


class Library:
    """Clips with all that is needed to score and show them, in a folder:

        about.json  what the library is: folder, source, model, cut, dim
        shards      files with their clips, the clips' vectors, features (float16) and filmstrips

    With a Milvus server, the same folder is named by `features`, on storage that every process sees. The
    server holds a copy of the vectors, from which `nearest` finds a shortlist; what it lacks, after a kill
    or because it is new, is sent by `describe`.

    The id of a clip is a hash of its file's name and a number, so names may hold any character. A file is
    marked unfinished before its clips are written and finished afterwards: `index` can continue after a kill.

    where: a folder that ends in .db, or the address of a Milvus server, http://host:19530 (/database).
    create: create the library if it does not exist. Raises DataError if it is missing or cannot be opened."""

    def __init__(self, where: str, create: bool = False, features: str | Path | None = None):
        self.where = where = where if "://" in where else where.rstrip("/")
        self.server = Milvus(where) if "://" in where else None
        if self.server and features is None:
            raise DataError(f"{where} needs --features DIR, a folder that every process sees.")
        if not self.server and features is not None:
            raise DataError(f"--features belongs to a Milvus server; {where} holds its features itself.")
        self.home = Path(features if self.server else where)
        _check_folder(self.home, bool(self.server), create)
        self.about, self._shards = self._read_about(), Shards(self.home)
        if not self.about and not create:
            raise DataError(f"{self.home} holds no library: {CREATE}.")
        self._writer: Writer | None = None
        self._time = 0  # of the last commit
        self._pending: dict[str, list[list[int]]] = {}  # key of a file: rows of clips that are not committed
        self._unsent: dict[str, list[dict]] = {}  # and what the server holds of them
        self._begun: set[str] = set()  # files that have no clips yet
        self._names: dict[str, str] = {}  # of files, by key, as far as they were asked for

    def _read_about(self) -> dict:
        path = self.home / "about.json"
        try:
            return json.loads(path.read_bytes()) if path.is_file() else {}
        except ValueError:
            raise DataError(f"{path} is damaged: index into a new library.") from None

    def describe(self, about: dict) -> None:
        """Stores what the library is: folder, source, model, cut, dim. Sends the server what it lacks."""
        path = self.home / "about.json"
        with writing(path, DataError, ADVICE):
            write_atomic(path, json.dumps(about).encode())
        self.about = about
        if self.server:
            self.server.create(about["dim"])
            self._send_missing()

    @property
    def state(self) -> State:
        """The clips as they are now; other processes may add and remove some. See engine/shards.py."""
        return self._shards.state()

    # ---- files

    @staticmethod
    def key(file: str) -> str:
        """The first part of the ids of a file's clips."""
        return hashlib.sha256(os.fsencode(file)).hexdigest()[:24]

    def files(self) -> dict[str, dict]:
        """All files, {name: {"stamp", "clips": number, "error", "mount"}}. Unfinished ones have stamp ""."""
        files = self._shards.state(now=True).files
        return {file: dict(entry[1]) for file, (entry, _) in files.items() if entry[1] is not None}

    def begin(self, files: Sequence[str], known: dict[str, dict]) -> None:
        """Marks files unfinished. Removes the clips of those that are already known."""
        empty, old = {"stamp": "", "clips": 0, "error": None}, [file for file in files if file in known]
        rows = {file: {**empty, "mount": known.get(file, {}).get("mount")} for file in files}
        self._commit({file: (row, []) for file, row in rows.items()}, old)
        self._begun.update(files)

    def finish(self, rows: dict[str, dict]) -> None:
        """Stores the rows of files whose clips are all written. A file without new ones keeps what it has."""
        spans = {file: self._pending.pop(self.key(file), []) for file in rows}
        for file in [file for file in rows if not spans[file] and file not in self._begun]:
            (_, row, old), s = self.state.files.get(file, ((0, None, []), 0))
            if row is not None and old:
                shard = self.state.shards[s]
                spans[file] = self._writing(shard.holds["frames"]).copy(shard, old)
        self._commit({file: (row, spans[file]) for file, row in rows.items()}, [])
        self._begun.difference_update(rows)

    def drop(self, files: Sequence[str]) -> None:
        """Removes files and their clips."""
        if files:
            self._commit(dict.fromkeys(files, (None, [])), files)

    def path(self, file: str) -> Path:
        """The path of a file of the library. Raises DataError for a name that points outside the folder."""
        folder = self.about["folder"]
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise DataError(f"{file!r} is not a name below {folder}: the library is damaged; index it again.")
        return Path(folder, file)

    # ---- writing

    def add(
        self,
        clips: Sequence[tuple[str, float, float | None]],  # id, start, end
        vectors: Float[Tensor, "clips dim"],
        frames: Float[Tensor, "clips frames dim"],
        thumbnails: Sequence[bytes],
    ) -> None:
        """Writes clips, which are found once their files are finished. Raises DataError if they cannot be
        written, ModelError if the features are not finite."""
        half = frames.cpu().half()
        if not (half.isfinite().all() and vectors.isfinite().all()):
            damage = "the model gives features that are not finite numbers: its weights are damaged"
            raise ModelError(f"{damage}; name another --checkpoint. What was indexed before is kept.")
        rows = np.zeros(len(clips), record(vectors.shape[1], frames.shape[1]))
        rows["n"] = [int(id.split("-")[1]) for id, _, _ in clips]
        rows["start"] = [start for _, start, _ in clips]
        rows["end"] = [-1 if end is None else end for _, _, end in clips]
        rows["vector"] = F.normalize(vectors.cpu().float(), dim=-1).numpy()
        rows["scale"] = (half.float().var(dim=-1, correction=0) + 1e-5).rsqrt().numpy()
        if self._writer and not self._pending:  # nothing waits for its commit to this shard
            if self._writer.rows >= ROWS or self._writer.holds["frames"] != frames.shape[1]:
                self.close()
        first, _ = self._writing(frames.shape[1]).add(rows, half.numpy(), thumbnails)
        for row, (id, _, _) in enumerate(clips, start=first):
            spans = self._pending.setdefault(id.split("-")[0], [])
            if spans and spans[-1][1] == row:
                spans[-1][1] += 1
            else:
                spans.append([row, row + 1])
        if self.server:
            for (id, start, end), vector in zip(clips, rows["vector"]):
                clip = {"id": id, "start": start, "end": end, "vector": vector}
                self._unsent.setdefault(id.split("-")[0], []).append(clip)

    def _writing(self, frames: int) -> Writer:
        """The shard to write to; frames: of a clip, 0 if no clip is written."""
        if self._writer is None:
            holds = {"model": self.about["model"], "dim": self.about["dim"]}
            self._writer = Writer(self.home, {**holds, "frames": frames or self.about.get("frames", 0)})
            self._time = self._shards.state(now=True).now()
        return self._writer

    def _commit(self, rows: dict[str, tuple[dict | None, list[list[int]]]], removed: Sequence[str]) -> None:
        """Makes files and clips visible, here and then in the server. removed: files to remove there."""
        if not rows:
            return
        writer, self._time = self._writing(0), max(self._time + 1, time.time_ns())
        writer.commit({file: (self._time, row, spans) for file, (row, spans) in rows.items()})
        self._shards.changed()
        if self.server:
            for file in removed:
                self.server.remove(self.key(file))
            unsent = ((file, clip) for file in rows for clip in self._unsent.pop(self.key(file), []))
            self.server.upsert([{**clip, "file": file} for file, clip in unsent])
            self._note_sent(writer.name, writer.size())

    def close(self) -> None:
        """Ends the shard that was written, so that it may be merged with others."""
        if self._writer:
            self._writer.close()
        self._writer, self._pending, self._unsent, self._begun = None, {}, {}, set()

    def merge(self) -> None:
        """Gives removed clips' room free, and merges small shards. See `Shards.merge`."""
        self.close()
        if self.server:
            self._send_missing()
        before = {shard.name for shard in self.state.shards}
        self._shards.merge()
        for shard in self._shards.state(now=True).shards if self.server else ():
            if shard.name not in before:  # the same clips
                self._note_sent(shard.name, shard.size)

    # ---- the server

    def _send(self, state: State, files: Iterable[str]) -> None:
        """Sends the server the clips of files."""
        numbers = np.concatenate([np.zeros(0, int), *map(state.of_file, files)])
        for first in range(0, len(numbers), 1000):
            rows = self._rows(state, part := numbers[first : first + 1000])
            for which, shard, places in state.places(part):
                for at, vector in zip(which.tolist(), shard.clips["vector"][places]):
                    rows[at] |= {"vector": vector, "file": state.names[state.file_of[part[at]]]}
            self.server.upsert(rows)

    def _send_missing(self) -> None:
        """Sends what was committed and is not noted as sent to this server. Another server has nothing yet.

        A shard that another process writes to now is left to that process."""
        state, name, empty = self._shards.state(now=True), self.server.name, self.server.count() == 0
        for shard in state.shards:
            path = shard.path("sent")
            sent = json.loads(path.read_bytes()).get(name, 0) if path.is_file() else 0
            with shard.path("journal").open("r+b") as journal:
                if sent >= shard.size or not lock(journal):
                    continue
                journal.seek(sent)
                lines = map(json.loads, journal.read(shard.size - sent).splitlines())
                files = {file for line in lines for file in line.get("files", ())}
                for file in () if empty else files:
                    self.server.remove(self.key(file))
                self._send(state, files)
                self._note_sent(shard.name, shard.size)

    def _note_sent(self, shard: str, size: int) -> None:
        with writing(self.home, DataError, ADVICE):
            write_atomic(self.home / f"{shard}.sent", json.dumps({self.server.name: size}).encode(), False)

    # ---- reading

    def __len__(self) -> int:
        return len(self.state)

    def _rows(self, state: State, numbers: Int[np.ndarray, " some"]) -> list[dict]:
        """{"id", "start", "end"} of clips by their numbers."""
        rows: list[dict] = [{}] * len(numbers)
        for which, shard, places in state.places(numbers):
            clips = shard.clips[["n", "start", "end"]][places].tolist()
            for at, file, (n, start, end) in zip(which.tolist(), state.file_of[numbers[which]], clips):
                key = self.key(name := state.names[file])
                self._names[key] = name
                rows[at] = {"id": f"{key}-{n}", "start": start, "end": None if end < 0 else end}
        return rows

    def clips(self, state: State, numbers: Int[np.ndarray, " n"], dtype: torch.dtype = torch.float) -> Rows:
        """Clips by their numbers in a state, in that order."""
        count = next((shard.holds["frames"] for shard in state.shards if shard.rows), 0)
        frames = np.empty((len(numbers), count, self.about["dim"]), np.float16)
        for which, shard, places in state.places(numbers):
            frames[which] = shard.frames[places]
        return self._rows(state, numbers), torch.from_numpy(frames).to(dtype)

    def _numbers(self, state: State, ids: Sequence[str]) -> Int[np.ndarray, " some"]:
        """The numbers of clips by their ids, in that order; ids that are not there are left out."""
        found = dict.fromkeys(ids, -1)
        files = dict(zip((id.split("-")[0] for id in ids), self._files(state, ids)))
        for key, file in files.items():
            own = state.of_file(file) if file is not None else np.zeros(0, int)
            wanted = [int(id.split("-")[1]) for id in ids if id.startswith(key)] if len(own) else []
            for which, shard, places in state.places(own):
                here = np.isin(n := shard.clips["n"][places], wanted)
                found |= zip([f"{key}-{n}" for n in n[here]], own[which[here]].tolist())
        return np.array([n for n in found.values() if n >= 0], int)

    def _files(self, state: State, ids: Sequence[str]) -> list[str | None]:
        """The file of each clip; None for one that is not there."""
        keys = [id.split("-")[0] for id in ids]
        if not self._names.keys() >= {*keys}:
            self._names.update((self.key(file), file) for file in state.files)
        files = [self._names.get(key) for key in keys]
        return [
            file if file in state.files and state.files[file][0][1] is not None else None for file in files
        ]

    def batches(self, size: int = 1000) -> Iterator[Rows]:
        """All clips, some at a time."""
        state = self.state
        for first in range(0, len(state), size):
            yield self.clips(state, np.arange(first, min(first + size, len(state))))

    def clips_of(self, file: str) -> Rows:
        """The clips of one file (its name below the folder), by start."""
        state = self.state
        rows, frames = self.clips(state, state.of_file(file))
        order = sorted(range(len(rows)), key=lambda n: rows[n]["start"])
        return [rows[n] for n in order], frames[order]

    def clip(self, id: str) -> tuple[dict, Float[Tensor, "1 frames dim"]] | None:
        """One clip by its id, or None if there is no such clip."""
        state = self.state
        rows, frames = self.clips(state, self._numbers(state, [id]))
        return (rows[0], frames) if rows else None

    def nearest(self, text: Float[Tensor, " dim"], count: int) -> Rows:
        """The shortlist: the clips whose vectors have the largest cosine with the text, largest first."""
        state = self.state
        return self.clips(state, self._nearest(state, text, count))

    def nearest_ids(self, text: Float[Tensor, " dim"], count: int) -> list[str]:
        """The ids of the shortlist, without reading the features."""
        state = self.state
        return [row["id"] for row in self._rows(state, self._nearest(state, text, count))]

    def _nearest(self, state: State, text: Tensor, count: int) -> Int[np.ndarray, " some"]:
        """The numbers of the shortlist: the server's, or those of a comparison with all vectors."""
        if self.server:
            return self._numbers(state, self.server.nearest(text.cpu().numpy(), count))
        cosines = [text.new_empty(0, device="cpu")]
        for s, shard in enumerate(state.shards):
            if shard.rows:
                every = torch.from_numpy(shard.clips["vector"]) @ text.cpu()
                cosines.append(every[torch.from_numpy(state.rows[state.of_shard(s)])])
        return torch.cat(cosines).topk(min(count, len(state))).indices.numpy()

    def file_rows(self, ids: Sequence[str]) -> list[dict]:
        """The row of the file of each clip: "file" (its name below the folder), "stamp", "clips", "error"."""
        state = self.state
        gone = {"file": "(removed from the library)", "stamp": ""}  # by another process
        files = self._files(state, ids)
        return [dict(gone) if file is None else {"file": file, **state.files[file][0][1]} for file in files]

    def names(self, ids: Sequence[str]) -> list[str]:
        """The file of each clip, as its name below the folder."""
        return [row["file"] for row in self.file_rows(ids)]

    def thumbnails(self, ids: Sequence[str]) -> dict[str, bytes]:
        """The filmstrip of each clip, by id."""
        state = self.state
        numbers = self._numbers(state, ids)
        strips = [b""] * len(numbers)
        for which, shard, places in state.places(numbers):
            for at, row in zip(which.tolist(), places.tolist()):
                strips[at] = shard.strip(row)
        return {row["id"]: strip for row, strip in zip(self._rows(state, numbers), strips)}


def _check_folder(path: Path, server: bool, create: bool) -> None:
    """Raises DataError if a library cannot be in a folder. Creates the folder if `create`."""
    if not server and path.suffix != ".db":
        raise DataError(f"--library {path}: name a folder that ends in .db, or a server, http://...")
    try:
        if path.is_file() or (path / "collections").is_dir():
            raise DataError(f"{path} was made by an older version of search.py: {AGAIN}.")
        known = (path / "about.json").is_file()
        others = path.is_dir() and any(not one.name.startswith("about.json.") for one in path.iterdir())
        if create and others and not known:
            raise DataError(f"{path} is a folder that holds no library: {OTHER}.")
        if not create and not known:
            raise DataError(f"{path} {'holds no library' if path.is_dir() else 'not found'}: {CREATE}.")
        if create:
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True)
    except OSError as error:
        file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "is not a folder" if file else f"gives the error {error.strerror}"
        raise DataError(f"{path} cannot be used ({error.filename or path} {reason}): {OTHER}.") from None
