"""A library of encoded clips in Milvus: a local folder (milvus-lite) or a server, with the same code.

Everything that search.py stores is written and read here. pymilvus is imported when a library is opened.
"""

import base64
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from engine.backbone import fingerprint
from engine.files import DataError, ModelError
from model import TMASS, MeanPool, XPool

ROW = 65_535  # characters in one field of a row, at most
NEAREST = 16_384  # rows that a vector search returns, at most
OTHER = "name another one with --library"
CREATE = f"create it with python search.py index FOLDER, or {OTHER}"
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
READ_ONLY = (
    "may not be written, and milvus-lite writes even to read; give yourself the right to write, or copy it"
)
HERE = ("localhost", "127.0.0.1", "::1")  # host names of this machine
DIRECT = {"grpc.enable_http_proxy": 0, "grpc.keepalive_time_ms": 300_000}  # milvus-lite refuses shorter times

Rows = tuple[list[dict], Float[Tensor, "clips frames dim"]]  # {"id", "start", "end"} of clips; their features


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
    radius: float | None  # mean radius of the text mass; None for a model without one


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
    """The frames side by side, as one JPEG of at most `most` bytes. In base64 it fits a row of a library."""
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
        o = psi.norm2(psi.out(psi.value(psi.norm1(frames)).mean(dim=1)))
        video = psi.norm3(o + psi.linear(o))
    elif type(psi) is MeanPool:
        video = psi(frames[:1, 0], frames)[0]
    else:
        video = torch.cat([psi(one.mean(dim=1), one)[0] for one in frames.split(1)])
    return F.normalize(video, dim=-1)


class Library:
    """Clips with all that is needed to score and show them, in three Milvus collections:

        tmass_clips       one row per clip: id, start, end (seconds), vector, features of its frames (float16)
        tmass_thumbnails  one row per clip: id, filmstrip
        tmass_files       one row per file: name, stamp, number of clips, error, mount point of its disk;
                          one row about the library

    The id of a clip is a hash of its file's name and a number, so names may hold any character. A file is
    marked unfinished before its clips are written and finished afterwards: `index` can continue after a kill.

    where: a folder that ends in .db, or the address of a Milvus server, http://host:19530 (/database).
    create: create the library if it does not exist. Raises DataError if it is missing or cannot be opened."""

    ABOUT = "library"  # id of the row about the library

    def __init__(self, where: str, create: bool = False):
        self._milvus, server = _import_pymilvus(), "://" in where
        self.where = where = where if server else where.rstrip("/")
        if not server:
            _check_folder(where, create)
        self.about: dict = {}  # folder, source, model, cut, dim
        try:
            here = not server or urllib.parse.urlsplit(where).hostname in HERE
            self.client = self._milvus.MilvusClient(where, **({"grpc_options": DIRECT} if here else {}))
            ready = list(filter(self._is_ready, ("clips", "thumbnails", "files")))
            for name in ready:
                self.client.load_collection(f"tmass_{name}")
            if "files" in ready:
                self.about = json.loads(self._get("files", [self.ABOUT]).get(self.ABOUT, "{}"))
        except (self._milvus.MilvusException, ValueError) as error:
            reason = str(getattr(error, "message", error)).strip().split("\n")[0]
            why = "no Milvus server answers there" if server else _why_closed(where, reason)
            raise DataError(f"{where} cannot be opened: {why} ({reason}).") from None
        if not self.about and not create:
            raise DataError(f"{where} holds no library: {CREATE}.")

    def _is_ready(self, name: str) -> bool:
        """Whether a collection has its index; a killed process may leave one without."""
        name = f"tmass_{name}"
        return self.client.has_collection(name) and bool(self.client.list_indexes(name))

    def describe(self, about: dict) -> None:
        """Stores what the library is: folder, source, model, cut, dim. Creates the collections if needed."""
        types = self._milvus.DataType
        for name in ("files", "thumbnails", "clips"):
            if self._is_ready(name):
                continue
            clips = name == "clips"
            schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field("id", types.VARCHAR, is_primary=True, max_length=64)
            schema.add_field("content", types.VARCHAR, max_length=ROW)  # JSON, or bytes in base64
            schema.add_field("vector", types.FLOAT_VECTOR, dim=about["dim"] if clips else 2)  # required
            if clips:
                schema.add_field("start", types.DOUBLE)
                schema.add_field("end", types.DOUBLE, nullable=True)
            index = self.client.prepare_index_params()
            index.add_index("vector", index_type="AUTOINDEX" if clips else "FLAT", metric_type="COSINE")
            if not self.client.has_collection(f"tmass_{name}"):
                if "://" not in self.where:  # a full disk leaves the start of a collection
                    shutil.rmtree(Path(self.where, "collections", f"tmass_{name}"), ignore_errors=True)
                self.client.create_collection(f"tmass_{name}", schema=schema, consistency_level="Strong")
            self.client.create_index(f"tmass_{name}", index, sync=False)  # the collection is still empty
            self.client.load_collection(f"tmass_{name}")
        self._put("files", {self.ABOUT: json.dumps(about)})
        self.about = about

    def _put(self, name: str, contents: dict[str, str]) -> None:
        rows = [{"id": id, "content": content, "vector": [1.0, 0.0]} for id, content in contents.items()]
        if rows:
            self.client.upsert(f"tmass_{name}", rows)

    def _get(self, name: str, ids: Sequence[str]) -> dict[str, str]:
        rows = ids and self.client.query(f"tmass_{name}", ids=list(ids), output_fields=["id", "content"])
        return {row["id"]: row["content"] for row in rows}

    def _all(self, name: str, fields: Sequence[str]) -> Iterator[list[dict]]:
        rows = self.client.query_iterator(f"tmass_{name}", batch_size=1000, output_fields=list(fields))
        while batch := rows.next():
            yield batch
        rows.close()

    # ---- files

    @staticmethod
    def key(file: str) -> str:
        """The first part of the ids of a file's clips."""
        return hashlib.sha256(os.fsencode(file)).hexdigest()[:24]

    def files(self) -> dict[str, dict]:
        """All files, {name: {"stamp", "clips": number, "error", "mount"}}. Unfinished ones have stamp ""."""
        batches = self._all("files", ["id", "content"])
        rows = [_file_row(row["content"]) for rows in batches for row in rows if row["id"] != self.ABOUT]
        return {row.pop("file"): row for row in rows}

    def begin(self, files: Sequence[str], known: dict[str, dict]) -> None:
        """Marks files unfinished. Removes the clips of those that are already known."""
        mounts = {file: known[file].get("mount") for file in files if file in known}
        empty = {"stamp": "", "clips": 0, "error": None}
        self._put_files({file: {**empty, "mount": mounts.get(file)} for file in files})
        self._drop_clips([file for file in files if file in known])

    def finish(self, rows: dict[str, dict]) -> None:
        """Stores the rows of files whose clips are all written."""
        self._put_files(rows)

    def _put_files(self, rows: dict[str, dict]) -> None:
        self._put("files", {self.key(file): json.dumps({"file": file, **row}) for file, row in rows.items()})

    def drop(self, files: Sequence[str]) -> None:
        """Removes files and their clips."""
        self._drop_clips(files)
        if files:
            self.client.delete("tmass_files", ids=[self.key(file) for file in files])

    def _drop_clips(self, files: Sequence[str]) -> None:
        for file in files:
            for name in ("clips", "thumbnails"):
                self.client.delete(f"tmass_{name}", filter=f'id like "{self.key(file)}-%"')

    def path(self, file: str) -> Path:
        """The path of a file of the library. Raises DataError for a name that points outside the folder."""
        folder = self.about["folder"]
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise DataError(f"{file!r} is not a name below {folder}: the library is damaged; index it again.")
        return Path(folder, file)

    # ---- clips

    def add(
        self,
        clips: Sequence[tuple[str, float, float | None]],  # id, start, end
        vectors: Float[Tensor, "clips dim"],
        frames: Float[Tensor, "clips frames dim"],
        thumbnails: Sequence[bytes],
    ) -> None:
        """Writes clips, and replaces those of the same id. Raises DataError if features do not fit a row, and
        ModelError if they are not finite."""
        half = frames.cpu().half()
        if not (half.isfinite().all() and vectors.isfinite().all()):
            damage = "the model gives features that are not finite numbers: its weights are damaged"
            raise ModelError(f"{damage}; name another --checkpoint. What was indexed before is kept.")
        contents = [base64.b64encode(one.numpy().tobytes()).decode() for one in half]
        if len(contents[0]) > ROW:
            size = f"{frames.shape[1]} frames of {frames.shape[2]} numbers"
            raise DataError(f"{size} do not fit a row of Milvus: use a model with fewer frames.")
        strips = {clip[0]: base64.b64encode(jpeg).decode() for clip, jpeg in zip(clips, thumbnails)}
        self._put("thumbnails", strips)
        fields = ("id", "start", "end", "vector", "content")
        rows = zip(clips, vectors.cpu().numpy(), contents)
        self.client.upsert("tmass_clips", [dict(zip(fields, (*clip, *rest))) for clip, *rest in rows])

    def __len__(self) -> int:
        return self.client.query("tmass_clips", filter="", output_fields=["count(*)"])[0]["count(*)"]

    FIELDS = ("id", "start", "end", "content")  # of a clip, without its vector

    def _rows(self, rows: Sequence[dict]) -> Rows:
        dim = self.about["dim"]
        frames = [np.frombuffer(base64.b64decode(row.pop("content")), np.float16) for row in rows]
        stacked = torch.from_numpy(np.stack(frames) if frames else np.empty((0, dim), np.float16))
        return list(rows), stacked.unflatten(1, (-1, dim)).float()

    def _query(self, **which) -> Rows:
        rows = self.client.query("tmass_clips", output_fields=list(self.FIELDS), **which)
        return self._rows(sorted(rows, key=lambda row: row["start"]))

    def batches(self) -> Iterator[Rows]:
        """All clips, some at a time."""
        yield from map(self._rows, self._all("clips", self.FIELDS))

    def clips_of(self, file: str) -> Rows:
        """The clips of one file (its name below the folder), by start."""
        return self._query(filter=f'id like "{self.key(file)}-%"')

    def clip(self, id: str) -> tuple[dict, Float[Tensor, "1 frames dim"]] | None:
        """One clip by its id, or None if there is no such clip."""
        rows, frames = self._query(ids=[id])
        return (rows[0], frames) if rows else None

    def nearest(self, text: Float[Tensor, " dim"], count: int) -> Rows:
        """The shortlist: the clips whose vectors have the largest cosine with the text, largest first."""
        return self._rows(self._search(text, count, self.FIELDS))

    def nearest_ids(self, text: Float[Tensor, " dim"], count: int) -> list[str]:
        """The ids of the shortlist, without reading the features."""
        return [row["id"] for row in self._search(text, count, ["id"])]

    def _search(self, text: Tensor, count: int, fields: Sequence[str]) -> list[dict]:
        count, vector = min(count, NEAREST), text.cpu().numpy()
        how = {"metric_type": "COSINE", "params": {"ef": count}}
        options = {"limit": count, "output_fields": list(fields), "search_params": how}
        return [dict(hit["entity"]) for hit in self.client.search("tmass_clips", data=[vector], **options)[0]]

    def file_rows(self, ids: Sequence[str]) -> list[dict]:
        """The row of the file of each clip: "file" (its name below the folder), "stamp", "clips", "error"."""
        keys = [id.split("-")[0] for id in ids]
        rows = self._get("files", sorted({*keys}))
        gone = json.dumps(
            {"file": "(removed from the library)", "stamp": ""}
        )  # by another process, on a server
        return [_file_row(rows.get(key, gone)) for key in keys]

    def names(self, ids: Sequence[str]) -> list[str]:
        """The file of each clip, as its name below the folder."""
        return [row["file"] for row in self.file_rows(ids)]

    def thumbnails(self, ids: Sequence[str]) -> dict[str, bytes]:
        """The filmstrip of each clip, by id."""
        return {id: base64.b64decode(content) for id, content in self._get("thumbnails", ids).items()}


def _file_row(content: str) -> dict:
    row = json.loads(content)
    if "source" in row:  # the name of the stamp in older libraries
        row["stamp"] = row.pop("source")
    return row


def _check_folder(where: str, create: bool) -> None:
    """Raises DataError if a local library cannot be at `where`. Creates its parent folder if `create`."""
    if not where.endswith(".db"):
        raise DataError(f"--library {where}: name a folder that ends in .db, or a server, http://...")
    path = Path(where)
    try:
        if path.is_file():
            what = "is a file, not the folder of a library (milvus-lite before 3.0 wrote files)"
            raise DataError(f"{where} {what}: {OTHER}.")
        known = (path / "collections").is_dir()  # the first thing that milvus-lite writes
        if create and not known and path.is_dir() and any(path.iterdir()):
            raise DataError(f"{where} is a folder that holds no library: {OTHER}.")
        if not create and not known:
            raise DataError(f"{where} {'holds no library' if path.is_dir() else 'not found'}: {CREATE}.")
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "is not a folder" if file else f"gives the error {error.strerror}"
        raise DataError(f"{where} cannot be used ({error.filename or where} {reason}): {OTHER}.") from None


def _why_closed(where: str, reason: str) -> str:
    """Why a local library cannot be opened: what milvus-lite raises, of which pymilvus gives no reason."""
    import milvus_lite

    if "Fail connecting" in reason:
        return "the server that milvus-lite starts for it does not answer"
    if any(f"[Errno {number}]" in reason for number in DENIED):
        return f"a part of it {READ_ONLY}"
    if "Open local milvus failed" not in reason:
        return "its data cannot be read; if it is damaged, index into a new one"
    try:
        milvus_lite.MilvusLite(where).close()
    except milvus_lite.DataDirLockedError as error:
        if isinstance(error.__cause__, BlockingIOError):
            return "another process has it open (search.py serve or index?); wait, or stop it"
        return "its file system cannot lock files; put it on a local disk"
    except OSError as error:
        if error.errno in DENIED:
            return f"{error.filename or where} {READ_ONLY}"
        return f"{error.filename or where}: {error.strerror}"
    except Exception as error:
        return f"it is damaged, index into a new one: {type(error).__name__}"
    return "it could not be opened at first; try again"


def _import_pymilvus() -> ModuleType:
    try:
        import milvus_lite  # noqa: F401  opens local files
        import pymilvus
    except ImportError as error:
        raise DataError(f"{error.name} is not installed: pip install -r requirements-search.txt.") from None
    for name in ("pymilvus", "milvus_lite"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they log the traceback of what they raise
    return pymilvus
