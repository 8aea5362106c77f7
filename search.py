"""Search your own videos: a library of clips, ranked by T-MASS's own score ("Inference Pipeline"), both ways.

    python search.py index FOLDER                                       # encodes every clip once, into library.db
    python search.py query "a red ring grows in the desert" --html found.html
    python search.py query --video clip.mp4 --captions captions.txt     # which captions fit a clip
    python search.py check                                              # what the shortlist misses
    python search.py serve                                              # a page on http://127.0.0.1:8000

A library is three Milvus collections: a local file (milvus-lite), or a cluster by `--library http://host:19530`, with the same code. A query
first finds a shortlist by vector search, text t against one vector a clip; the shortlist is then ranked by the exact score, the best of M
texts drawn for each text-video pair (`evaluate.scores`). A small library has no shortlist: all of it is scored exactly.
Needs what requirements-search.txt lists.
"""

import base64
import contextlib
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import random
import re
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

import data
import shapes
from data import VIDEO_SUFFIXES, Clip, DataError, decode_frames, in_parallel
from evaluate import EvaluationConfig, autocast, choose_device, fingerprint, latest_run, noise_bank, open_checkpoint, prior_of, scores
from model import TMASS, ModelError, XPool, load_clip

SHORTLIST = 1000  # clips that vector search leaves to the exact score; a library of at most twice as many is scored whole

# ------------------------------------------------------------------------------------------------------------------------- library


class Library:
    """Clips with what scoring and showing them needs, as Milvus collections.

        tmass_clips        a clip: id, start and end (seconds; no end: the file's), its one vector (`overall`), the features of its frames (float16)
        tmass_thumbnails   a clip: id, one JPEG of all its frames side by side
        tmass_files        a file: its name, what it was when it was read, how many clips, why it is broken; and one row of the library

    A clip's id is a hash of its file's name and a number; nothing else of a name is an id, so names may hold any character. A file's row is
    marked unfinished before its clips are written and finished after: whatever kills the program, `index` knows what to do again.

    where    a path that ends in .db, or the address of a Milvus server, http://host:19530 (/database)
    create   make it if it is not there; else DataError"""

    ABOUT = "library"

    def __init__(self, where: str, create: bool = False):
        self.where, self._milvus = where, _import_pymilvus()
        if "://" not in where:
            if not where.endswith(".db"):
                raise DataError(f"--library {where}: a local library's name ends in .db; a Milvus server's address begins with http://.")
            if not create and not Path(where).exists():
                raise DataError(f"{where} not found: make it first (python search.py index FOLDER), or name another by --library.")
            Path(where).absolute().parent.mkdir(parents=True, exist_ok=True)
        try:
            self.client = self._milvus.MilvusClient(where)
        except self._milvus.MilvusException as error:
            reason = "no Milvus server answers there" if "://" in where else "another process has it open (search.py serve?), or it is damaged"
            raise DataError(f"{where} cannot be opened: {reason} ({error.message}).") from None
        for name in ("files", "thumbnails", "clips"):
            if self.client.has_collection(f"tmass_{name}"):
                self.client.load_collection(f"tmass_{name}")
        self.about = json.loads(self._get("files", [self.ABOUT]).get(self.ABOUT, "{}")) if self.client.has_collection("tmass_files") else {}
        if not self.about and not create:
            raise DataError(f"{where} holds no library: make it first (python search.py index FOLDER), or name another by --library.")

    def describe(self, about: dict, dim: int) -> None:
        """Writes what the library is (folder, model, how files are cut), making the collections where they are not there yet."""
        string, vector = self._milvus.DataType.VARCHAR, self._milvus.DataType.FLOAT_VECTOR
        double = self._milvus.DataType.DOUBLE
        for name in ("files", "thumbnails", "clips"):
            if self.client.has_collection(f"tmass_{name}"):
                continue
            schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field("id", string, is_primary=True, max_length=64)
            schema.add_field("content", string, max_length=65535)  # JSON, or base64 of bytes
            schema.add_field("vector", vector, dim=dim if name == "clips" else 2)  # Milvus has no collection without a vector
            if name == "clips":
                schema.add_field("start", double)
                schema.add_field("end", double, nullable=True)
            index = self.client.prepare_index_params()
            index.add_index("vector", index_type="AUTOINDEX" if name == "clips" else "FLAT", metric_type="COSINE")
            self.client.create_collection(f"tmass_{name}", schema=schema, consistency_level="Strong")
            self.client.create_index(f"tmass_{name}", index, sync=False)  # there is nothing to wait for yet
            self.client.load_collection(f"tmass_{name}")
        self._put("files", {self.ABOUT: json.dumps(about)})
        self.about = about

    def _put(self, name: str, contents: dict[str, str]) -> None:
        if contents:
            self.client.upsert(f"tmass_{name}", [{"id": key, "content": content, "vector": [1.0, 0.0]} for key, content in contents.items()])

    def _get(self, name: str, ids: Sequence[str]) -> dict[str, str]:
        rows = self.client.query(f"tmass_{name}", ids=list(ids), output_fields=["id", "content"]) if ids else []
        return {row["id"]: row["content"] for row in rows}

    def _all(self, name: str, fields: Sequence[str]) -> Iterator[list[dict]]:
        rows = self.client.query_iterator(f"tmass_{name}", batch_size=1000, output_fields=list(fields))
        while batch := rows.next():
            yield batch
        rows.close()

    @staticmethod
    def key(file: str) -> str:
        """What the ids of a file's clips begin with."""
        return hashlib.sha256(os.fsencode(file)).hexdigest()[:24]

    def files(self) -> dict[str, dict]:
        """Every file: its name below the folder, and {"source", "clips", "error"}; source is empty where it is unfinished."""
        rows = (json.loads(row["content"]) for batch in self._all("files", ["id", "content"]) for row in batch if row["id"] != self.ABOUT)
        return {row.pop("file"): row for row in rows}

    def begin(self, files: Sequence[str], known: dict[str, dict]) -> None:
        """Marks files unfinished, and drops what clips they had."""
        self._put("files", {self.key(file): json.dumps({"file": file, "source": "", "clips": 0, "error": None}) for file in files})
        self._drop_clips([file for file in files if file in known])

    def finish(self, rows: dict[str, dict]) -> None:
        """Marks files finished: their clips are all there."""
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

    def add(
        self,
        clips: Sequence[tuple[str, float, float | None]],  # id, start, end
        vectors: Float[Tensor, "clips dim"],
        frames: Float[Tensor, "clips frames dim"],
        thumbnails: Sequence[bytes],
    ) -> None:
        """Writes clips; those of the same id are replaced."""
        self._put("thumbnails", {clip[0]: base64.b64encode(jpeg).decode() for clip, jpeg in zip(clips, thumbnails)})
        contents = [base64.b64encode(f.numpy().tobytes()).decode() for f in frames.cpu().half()]
        if len(contents[0]) > 65535:
            raise DataError(f"{frames.shape[1]} frames of {frames.shape[2]} numbers are more than a row of Milvus holds: use fewer frames.")
        rows = zip(clips, vectors.cpu().numpy(), contents)
        fields = ("id", "start", "end", "vector", "content")
        self.client.upsert("tmass_clips", [dict(zip(fields, (*clip, vector, content))) for clip, vector, content in rows])

    def __len__(self) -> int:
        return self.client.query("tmass_clips", filter="", output_fields=["count(*)"])[0]["count(*)"]

    def _rows(self, rows: Sequence[dict]) -> tuple[list[dict], Float[Tensor, "clips frames dim"]]:
        dim = self.about["dim"]
        frames = [np.frombuffer(base64.b64decode(row.pop("content")), np.float16) for row in rows]
        return list(rows), torch.from_numpy(np.stack(frames) if frames else np.empty((0, dim), np.float16)).unflatten(1, (-1, dim)).float()

    def batches(self) -> Iterator[tuple[list[dict], Float[Tensor, "clips frames dim"]]]:
        """All clips, some at a time: their rows {"id", "start", "end"}, and the features of their frames."""
        for batch in self._all("clips", ["id", "start", "end", "content"]):
            yield self._rows(batch)

    def nearest(self, text: Float[Tensor, " dim"], count: int, features: bool = True) -> tuple[list[dict], Float[Tensor, "clips frames dim"] | None]:
        """The shortlist: the clips whose vectors have the largest cosine with the text, largest first, with or without features."""
        count = min(count, 16384)  # Milvus gives no more
        found = self.client.search(
            "tmass_clips", data=[text.cpu().numpy()], limit=count, output_fields=["id", "start", "end"] + ["content"] * features,
            search_params={"metric_type": "COSINE", "params": {"ef": count}},
        )[0]  # fmt: skip
        rows = [dict(hit["entity"]) for hit in found]
        return self._rows(rows) if features else (rows, None)

    def clips_of(self, file: str) -> tuple[list[dict], Float[Tensor, "clips frames dim"]]:
        """The clips of one file, by its name below the folder."""
        rows = self.client.query("tmass_clips", filter=f'id like "{self.key(file)}-%"', output_fields=["id", "start", "end", "content"])
        return self._rows(sorted(rows, key=lambda row: row["start"]))

    def clip(self, id: str) -> tuple[dict, Float[Tensor, "1 frames dim"]] | None:
        """One clip by its id; None where there is none."""
        rows, frames = self._rows(self.client.query("tmass_clips", ids=[id], output_fields=["id", "start", "end", "content"]))
        return (rows[0], frames) if rows else None

    def names(self, ids: Sequence[str]) -> list[str]:
        """The file of each clip, below the folder."""
        keys = [id.split("-")[0] for id in ids]
        rows = self._get("files", sorted({*keys}))
        return [json.loads(rows[key])["file"] for key in keys]

    def path(self, file: str) -> Path:
        """Where a file of the library lies. Raises DataError for a name that leads out of the folder."""
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise DataError(f"{file!r} is no name below {self.about['folder']}: the library is damaged; index it again.")
        return Path(self.about["folder"], file)

    def thumbnails(self, ids: Sequence[str]) -> dict[str, bytes]:
        """The JPEG of each clip's frames side by side."""
        return {id: base64.b64decode(content) for id, content in self._get("thumbnails", ids).items()}


def _import_pymilvus():
    try:
        import milvus_lite  # noqa: F401  what opens local files
        import pymilvus
    except ImportError as error:
        raise DataError(f"{error.name} is not installed: pip install -r requirements-search.txt.") from None
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs each error with a traceback, and raises it too
    logging.getLogger("milvus_lite").setLevel(logging.CRITICAL)
    return pymilvus


# --------------------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Source:
    """Which model: a run or checkpoint, or CLIP alone with mean pooling (zero-shot). JSON in the library, to open it again."""

    checkpoint: str | None = None
    arch: str | None = None
    weights: str | None = None
    num_frames: int = 12

    def open(self, device: torch.device) -> tuple[TMASS, dict]:
        """The model in eval mode, and the config it was trained with. Raises ModelError."""
        if self.checkpoint:
            model, trained, _ = open_checkpoint(Path(self.checkpoint))
        elif self.arch == "tiny" and not self.weights:
            raise ModelError("--arch tiny is random without --weights FILE: name a trained run by --checkpoint.")
        else:
            model, trained = TMASS(load_clip(self.arch, self.weights), "clip", self.num_frames), {}
        return model.to(device).eval(), trained

    @property
    def name(self) -> str:
        """For people."""
        return self.checkpoint or f"{self.arch}, zero-shot (CLIP's own features, mean-pooled over the frames; no training, no text mass)"


def identity(model: TMASS) -> str:
    """What a library's clips were made by: a hash of all weights, and T'."""
    return f"{fingerprint(model)}-{model.arguments['num_frames']}"


@torch.no_grad()
def overall(model: TMASS, frames: Float[Tensor, "videos frames dim"]) -> Float[Tensor, "videos dim"]:
    """One vector a video, the same for every text, for the shortlist: v as psi makes it when it looks at all frames alike, of length 1.

    psi's W_o, LN2, LN3 and P turn the space that frames live in to that of texts; the plain mean of frames would stay behind."""
    psi = model.fusion
    if isinstance(psi, XPool):
        o = psi.norm2(psi.out(psi.value(psi.norm1(frames)).mean(dim=1)))  # a_i = 1 / T'
        return F.normalize(psi.norm3(o + psi.linear(o)), dim=-1)
    return F.normalize(psi(frames[:1, 0], frames)[0], dim=-1)


@dataclass(frozen=True)
class Hit:
    """A clip that was found: its place, the score, how the text looks at its frames (attention) and the mean radius of the text mass."""

    rank: int
    score: float
    id: str
    file: str
    start: float
    end: float | None
    attention: list[float]
    radius: float | None  # None: the model has no text mass

    @property
    def span(self) -> str:
        """For people: 10-20 s."""
        if not self.start and self.end is None:
            return "whole file"
        return f"{round(self.start, 1):g} s-end" if self.end is None else f"{round(self.start, 1):g}-{round(self.end, 1):g} s"


class Searcher:
    """A library and the model that made it. Raises DataError where another model made it.

    shortlist   clips that are scored exactly; libraries of at most twice as many are scored whole, and kept in memory"""

    def __init__(self, library: Library, source: Source | None = None, M: int = 20, seed: int = 0, shortlist: int = SHORTLIST, device: str = "auto"):
        self.library, self.shortlist, self.device = library, shortlist, choose_device(device)
        own = Source(**library.about["source"])
        self.source = source or own
        self.model, self.trained = self.source.open(self.device)
        if identity(self.model) != library.about["model"]:
            raise DataError(f"{library.where} was made by another model ({own.name}) than {self.source.name} is now: name that one by --checkpoint, "
                            "or index into another --library.")  # fmt: skip
        prior = prior_of(EvaluationConfig(), self.trained, self.trained.get("dataset", ""))
        M = M if self.model.radius is not None else 0
        self.noise = noise_bank(M, library.about["dim"], seed, **prior).to(self.device)

    def notes(self, query: str) -> list[str]:
        """What somebody who asks this should know."""
        length, most = len(data._import_clip().clip._tokenizer.encode(query)) + 2, self.model.clip.context_length
        cut = [f"the query has {length} tokens; the model reads the first {most}."] if length > most else []
        foreign = ["CLIP learned from English captions: a query in another language may find little."] if re.search(r"[^\W\d_a-zA-Z]", query) else []
        return cut + foreign

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """phi_t of captions. Raises DataError for one that is empty."""
        if not all(caption.strip() for caption in captions):
            raise DataError("the query is empty: say what to look for.")
        tokens = data.tokenize(captions, self.model.clip.context_length)
        return torch.cat([self.model.encode_text(part.to(self.device)) for part in tokens.split(256)])

    @functools.cached_property
    def whole(self) -> tuple[list[dict], Float[Tensor, "clips frames dim"]] | None:
        """All clips of a small library; None for a larger one. Raises DataError for an empty one."""
        count = len(self.library)
        if count == 0:
            raise DataError(f"{self.library.where} holds no clip: index a folder of videos first.")
        if count > 2 * self.shortlist:
            return None
        batches = list(self.library.batches())
        return [row for rows, _ in batches for row in rows], torch.cat([frames for _, frames in batches])

    def score(self, text: Float[Tensor, "texts dim"], frames: Float[Tensor, "clips frames dim"]) -> Float[Tensor, "texts clips"]:
        """The exact score of every pair, as evaluate.py scores it."""
        return scores(self.model, text, frames.to(self.device), self.noise)

    @torch.no_grad()
    def search(self, query: str, k: int = 5) -> list[Hit]:
        """The k best clips for a query, best first; of equal scores, the smaller id first."""
        text = self.text([query])
        rows, frames = self.whole or self.library.nearest(text[0], self.shortlist)
        score = self.score(text, frames)[0].tolist()
        best = sorted(range(len(rows)), key=lambda n: (-score[n], rows[n]["id"]))[:k]
        found = frames[best].to(self.device)
        psi, radius = self.model.fusion, self.model.radius
        attention = psi.attention(text, found)[0].mean(dim=1) if isinstance(psi, XPool) else torch.full(found.shape[:2], 1 / found.shape[1])
        radii = [None] * len(best) if radius is None else radius(text, found, psi(text, found))[0].mean(dim=-1).tolist()
        names = self.library.names([rows[n]["id"] for n in best])
        return [
            Hit(rank, score[n], rows[n]["id"], name, rows[n]["start"], rows[n]["end"], a, r)
            for rank, (n, name, a, r) in enumerate(zip(best, names, attention.tolist(), radii), start=1)
        ]

    def captions(self, frames: Float[Tensor, "1 frames dim"], captions: Sequence[str]) -> list[tuple[float, str]]:
        """Video-to-text: captions with their scores for one clip, best first."""
        score = self.score(self.text(captions), frames)[:, 0].tolist()
        return sorted(zip(score, captions), key=lambda pair: -pair[0])


def read_captions(path: Path | None, trained: dict) -> list[str]:
    """The lines of a file; without one, captions of the built-in clips for a model that was trained on them, else everyday sentences."""
    if path is not None:
        if not path.is_file():
            raise DataError(f"{path} not found: name a text file with a caption a line by --captions.")
        if not (lines := data._lines(path)):
            raise DataError(f"{path} holds no caption: write one a line.")
        return list(dict.fromkeys(lines))
    if trained.get("dataset") == "shapes":
        return list(dict.fromkeys(caption.text for number in range(100_000, 100_100) for caption in shapes.make_clip(0, number).captions))
    who = ["a man", "a woman", "a child", "two people", "a crowd", "a dog", "a cat", "a bird"]
    does = ["is running", "is talking", "is sitting still", "is jumping", "is playing", "is eating", "moves slowly", "turns around"]
    where = ["in a kitchen", "in a street", "on a beach", "in the snow", "in a forest", "on a stage", "in a car", "at night"]
    return [" ".join(words) for words in itertools.product(who, does, where)]


# -------------------------------------------------------------------------------------------------------------------------- index


def videos_below(folder: Path) -> dict[str, Path]:
    """The video files below a folder, by their names relative to it: known endings, and names that end in a bare dot (DiDeMo has such)."""
    found = (path for path in data.files_below(folder) if path.suffix.lower() in VIDEO_SUFFIXES or path.name.endswith("."))
    return {path.relative_to(folder).as_posix(): path for path in found}


def spans(path: Path, cut: str) -> list[tuple[float, float | None]]:
    """The clips to make of a file, (start, end) in seconds. cut: "whole", "scenes", or "window S": windows of about S seconds."""
    if cut == "whole":
        return [(0.0, None)]
    if cut == "scenes":
        edges = _scene_starts(path)
    else:
        window = float(cut.split()[1])
        edges = [n * window for n in range(max(1, round(data.duration(path) / window)))]  # the last is 0.5 to 1.5 windows long
    return list(zip(edges, [*edges[1:], None]))


def _scene_starts(path: Path) -> list[float]:
    try:
        import scenedetect
    except ImportError:
        raise DataError("scenedetect is not installed: pip install -r requirements-search.txt, or use --window 10.") from None
    data.duration(path)  # says what is wrong with a broken file
    try:
        return [start.seconds for start, _ in scenedetect.detect(str(path), scenedetect.ContentDetector())] or [0.0]
    except (scenedetect.VideoOpenFailure, OSError) as error:
        raise DataError(f"{path} cannot be cut into scenes ({error}): replace it, or use --window 10.") from None


def filmstrip(frames: Sequence[UInt8[np.ndarray, "height width 3"]], height: int = 72, most: int = 48_000) -> bytes:
    """Frames side by side, as one JPEG of at most `most` bytes (a row of Milvus holds 64 KiB of base64)."""
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


def read_clip(clip: Clip, num_frames: int, size: int) -> tuple[UInt8[Tensor, "frames 3 size size"], bytes] | DataError:
    """The frames of a clip as CLIP sees them, and its filmstrip; or what is wrong with it."""
    try:
        pictures = decode_frames(clip.path, num_frames, clip.start, clip.end)
    except DataError as error:
        return error
    images = torch.from_numpy(np.stack([data.resize(picture, size) for picture in pictures])).permute(0, 3, 1, 2)
    return data.center_crop(images, size), filmstrip(pictures)


@torch.no_grad()
def encode(model: TMASS, images: Sequence[UInt8[Tensor, "frames 3 size size"]]) -> Float[Tensor, "clips frames dim"]:
    """phi_v of the frames of clips, on the model's device."""
    device = model.logit_scale.device
    with autocast(device, "auto"):
        return model.encode_frames(data.normalise(torch.stack(list(images)).to(device)))


def stamp(path: Path, cut: str) -> str:
    """What a file is: bytes, time of change, and how it is cut. A file of another stamp is read again."""
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {cut}"


def _need_ffmpeg() -> None:
    try:
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-version"], capture_output=True, check=True)
    except (RuntimeError, OSError, subprocess.CalledProcessError):
        raise DataError("no ffmpeg that runs: pip install imageio-ffmpeg, or name one by IMAGEIO_FFMPEG_EXE.") from None


def index(
    folder: tyro.conf.Positional[Path],
    library: str = "library.db",
    checkpoint: Path | None = None,
    arch: str | None = None,
    weights: Path | None = None,
    num_frames: int = 12,
    window: float | None = None,
    scenes: bool = False,
    moved: bool = False,
    retry: bool = False,
    batch: int = 16,
    device: str = "auto",
) -> int:
    """Makes the library of a folder, or brings it up to date: new and changed files are encoded, removed ones dropped, broken ones listed.

    Can be stopped, or killed, at any time; the same command goes on. Exit code 1: the library holds no clip.

    Args:
        folder: videos, at any depth
        library: a file that ends in .db, or a Milvus server, http://host:19530
        checkpoint: a run or checkpoint; default: the library's own, else the latest run under runs/
        arch: instead: ViT-B/32 (or another CLIP) as it is, zero-shot, frames mean-pooled
        weights: for --arch: CLIP's weights as a file
        num_frames: for --arch: frames a clip
        window: cut files into windows of about so many seconds; 0: whole files; default: as the library was cut before
        scenes: cut files into scenes (scenedetect)
        moved: the library's folder is now at another place
        retry: try broken files again, though they have not changed
        batch: clips encoded at once
        device: auto, cpu, cuda
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: name the folder of your videos.")
    if (scenes and window is not None) or not 0 <= (window or 0) < float("inf"):
        raise DataError("--window takes seconds, 0 or more, and not beside --scenes.")
    _need_ffmpeg()
    found = videos_below(folder)
    if not found:
        raise DataError(f"{folder} holds no video ({', '.join(sorted(VIDEO_SUFFIXES))}): name another folder.")
    db = Library(library, create=True)
    place = str(folder.resolve())
    if db.about.get("folder", place) != place and not moved:
        raise DataError(f"{library} is the library of {db.about['folder']}: name another --library, or add --moved if that folder is now {folder}.")
    if checkpoint or arch:
        source = Source(checkpoint and str(checkpoint.resolve()), arch, weights and str(weights.resolve()), num_frames)
    else:
        source = Source(**db.about["source"]) if db.about else Source(str(latest_run().resolve()))
    model, _ = source.open(choose_device(device))
    if db.about.get("model", identity(model)) != identity(model):
        was = Source(**db.about["source"]).name
        raise DataError(f"{library} was made by another model ({was}) than {source.name} is now: name that one, or another --library.")
    print(f"model: {source.name}", file=sys.stderr)
    cut = "scenes" if scenes else f"window {window:g}" if window else "whole" if window == 0 else db.about.get("cut", "whole")
    about = {"folder": place, "source": asdict(source), "model": identity(model), "cut": cut, "dim": model.clip.text_projection.shape[1]}
    db.describe(about, about["dim"])

    known, started = db.files(), time.time()
    stamps = {file: stamp(path, cut) for file, path in found.items()}
    gone = [file for file in known if file not in found]
    todo = [file for file in found if known.get(file, {}).get("source") != stamps[file] or (retry and known[file]["error"])]
    db.drop(gone)
    clips = 0
    with tqdm(total=len(todo), desc="clips", unit=" clips", disable=not todo) as bar:
        for group in (todo[n : n + batch] for n in range(0, len(todo), batch)):
            db.begin(group, known)
            done = {file: {"source": stamps[file], "clips": 0, "error": None} for file in group}
            ready = []
            for file, parts in zip(group, in_parallel(functools.partial(_try_spans, found, cut), group, "cutting")):
                if isinstance(parts, DataError):
                    done[file]["error"] = str(parts)
                    bar.update()
                    continue
                bar.total += len(parts) - 1
                ready += [(file, f"{db.key(file)}-{n}", Clip(file, found[file], (), "", *part)) for n, part in enumerate(parts)]
            for part in (ready[n : n + batch] for n in range(0, len(ready), batch)):
                work = functools.partial(read_clip, num_frames=model.arguments["num_frames"], size=model.resolution)
                results = list(zip(part, in_parallel(work, [clip for _, _, clip in part], "decoding")))
                for (file, _, _), result in results:
                    if isinstance(result, DataError):
                        done[file]["error"] = done[file]["error"] or str(result)
                    else:
                        done[file]["clips"] += 1
                good = [(id, clip, *result) for (_, id, clip), result in results if not isinstance(result, DataError)]
                if good:
                    features = encode(model, [images for _, _, images, _ in good])
                    rows = [(id, clip.start, clip.end) for id, clip, _, _ in good]
                    db.add(rows, overall(model, features), features, [strip for *_, strip in good])
                clips += len(good)
                bar.update(len(part))
            db.finish(done)
    seconds, files, count = time.time() - started, db.files(), len(db)
    new = sum(file not in known for file in todo)
    broken = {file: row["error"] for file, row in files.items() if row["error"]}
    rate = f", {clips} clips encoded in {seconds:.1f} s ({clips / seconds:.1f} clips/s)" if clips else ""
    print(f"{library}: {count} clips of {len(files)} files; {new} new, {len(todo) - new} read again, {len(gone)} removed, "
          f"{len(files) - len(todo)} unchanged, {len(broken)} broken{rate}")  # fmt: skip
    for error in broken.values():
        print(_printable(f"broken: {error}"))
    return 0 if count else 1


def _try_spans(found: dict[str, Path], cut: str, file: str) -> list[tuple[float, float | None]] | DataError:
    try:
        return spans(found[file], cut)
    except DataError as error:
        return error


def _printable(text: str) -> str:
    """Names of files may hold bytes that are no UTF-8."""
    return text.encode(errors="replace").decode()


# -------------------------------------------------------------------------------------------------------------------------- query


def query(
    text: tyro.conf.Positional[str] = "",
    library: str = "library.db",
    k: Annotated[int, tyro.conf.arg(aliases=("-k",))] = 5,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    html: Path | None = None,
    video: str | None = None,
    captions: Path | None = None,
    M: int = 20,
    seed: int = 0,
    shortlist: int = SHORTLIST,
    checkpoint: Path | None = None,
    device: str = "auto",
) -> int:
    """Finds the clips that fit a text, or with --video the captions that fit a clip.

    Args:
        text: what to look for
        library: a file that ends in .db, or a Milvus server, http://host:19530
        k: how many to show
        json_: print JSON
        html: also write one page with everything in it but the videos
        video: a file of the library (its name below the folder), or any other video file: rank captions for it
        captions: for --video: a text file, a caption a line; default: a built-in list
        M: texts drawn for each text-video pair; 0: t itself
        seed: of the draws
        shortlist: clips that are scored exactly; a library of at most twice as many is scored whole
        checkpoint: where the library's model is, if it was moved
        device: auto, cpu, cuda
    """
    if k < 1 or shortlist < 1:
        raise DataError("-k and --shortlist must be 1 or more.")
    if not text.strip() and video is None:
        raise DataError('the query is empty: say what to look for, as in search.py query "a dog runs", or name a clip by --video.')
    searcher = Searcher(Library(library), checkpoint and Source(str(checkpoint.resolve())), M, seed, shortlist, device)
    if video is not None:
        return _query_video(searcher, video, read_captions(captions, searcher.trained), k, json_)
    for note in ([searcher.source.name] if searcher.source.arch else []) + searcher.notes(text):
        print(f"note: {note}", file=sys.stderr)
    hits = searcher.search(text, k)
    if html is not None:
        write_page(html, searcher, text, hits)
        print(f"written: {html}", file=sys.stderr)
    if json_:
        print(json.dumps([asdict(hit) for hit in hits], indent=2))
    else:
        print("rank  score  radius  file")
        for hit in hits:
            radius = "-" if hit.radius is None else f"{hit.radius:.3f}"
            print(_printable(f"{hit.rank:>4}  {hit.score:.3f}  {radius:>6}  {hit.file}  {hit.span}"))
    return 0


def _query_video(searcher: Searcher, video: str, captions: list[str], k: int, json_: bool) -> int:
    rows, frames = searcher.library.clips_of(video)
    if not rows:
        if not Path(video).is_file():
            raise DataError(f"{video} is neither a file of {searcher.library.where} nor any other file: name a video.")
        result = read_clip(Clip(video, Path(video), (), ""), searcher.model.arguments["num_frames"], searcher.model.resolution)
        if isinstance(result, DataError):
            raise result
        rows, frames = [{"start": 0.0, "end": None}], encode(searcher.model, [result[0]])
    answers = []
    for row, own in zip(rows, frames.split(1)):
        best = searcher.captions(own, captions)[:k]
        answers.append({"file": video, "start": row["start"], "end": row["end"], "captions": [{"score": s, "caption": c} for s, c in best]})
        if not json_:
            span = Hit(0, 0.0, "", video, row["start"], row["end"], [], None).span
            print(_printable("\n".join([f"{video}  {span}", *(f"{n:>4}  {s:.3f}  {c}" for n, (s, c) in enumerate(best, start=1))])))
    if json_:
        print(json.dumps(answers, indent=2))
    return 0


def write_page(path: Path, searcher: Searcher, text: str, hits: Sequence[Hit]) -> None:
    """One self-contained page: results, filmstrips as data, links to the videos relative to the page."""
    strips = searcher.library.thumbnails([hit.id for hit in hits])
    shown = []
    for hit in hits:
        href = os.path.relpath(searcher.library.path(hit.file), path.resolve().parent)
        strip = f"data:image/jpeg;base64,{base64.b64encode(strips[hit.id]).decode()}" if hit.id in strips else ""
        shown.append({**asdict(hit), "file": _printable(hit.file), "video": urllib.parse.quote(os.fsencode(href)), "strip": strip})
    content = {"query": text, "hits": shown, "notes": [*searcher.notes(text)], "model": searcher.source.name}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_page(content), encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): name another file by --html.") from None


def _page(content: dict) -> str:
    """page.html with what it shows; no text of a user ends the script element early."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return page.replace("/*CONTENT*/ null", json.dumps(content).replace("<", "\\u003c"))


# -------------------------------------------------------------------------------------------------------------------------- check


def recall(searcher: Searcher, captions: Sequence[str], sizes: Sequence[int], k: int = 10, progress: bool = False) -> dict[int, float]:
    """For each size of the shortlist, the share of the k clips that score best in the whole library that it holds; mean over captions."""
    text = searcher.text(captions)
    ids: list[str] = []
    parts = []
    for rows, frames in tqdm(searcher.library.batches(), desc="scoring everything", unit=" batches", disable=not progress):
        ids += [row["id"] for row in rows]
        parts.append(searcher.score(text, frames).cpu())
    if not ids:
        raise DataError(f"{searcher.library.where} holds no clip: index a folder of videos first.")
    best = torch.cat(parts, dim=1).topk(min(k, len(ids)), dim=1).indices.tolist()
    found = {size: 0 for size in sizes}
    for t, own in zip(text, best):
        order = [row["id"] for row in searcher.library.nearest(t, max(sizes), features=False)[0]]
        for size in sizes:
            found[size] += len({ids[n] for n in own} & {*order[:size]})
    return {size: count / sum(map(len, best)) for size, count in found.items()}


def check(
    library: str = "library.db",
    queries: int = 100,
    captions: Path | None = None,
    shortlist: int = SHORTLIST,
    floor: float = 0.95,
    M: int = 20,
    seed: int = 0,
    checkpoint: Path | None = None,
    device: str = "auto",
) -> int:
    """Measures what the shortlist misses: recall@10 against scoring every clip of the library. Exit code 1: below --floor.

    Args:
        library: a file that ends in .db, or a Milvus server, http://host:19530
        queries: how many captions to ask, drawn by --seed
        captions: a text file, a caption a line; default: a built-in list
        shortlist: the size that is judged; smaller ones are shown too
        floor: the least recall@10
        M: texts drawn for each text-video pair
        seed: of the captions and the draws
        checkpoint: where the library's model is, if it was moved
        device: auto, cpu, cuda
    """
    if queries < 1 or shortlist < 1:
        raise DataError("--queries and --shortlist must be 1 or more.")
    searcher = Searcher(Library(library), checkpoint and Source(str(checkpoint.resolve())), M, seed, shortlist, device)
    asked = read_captions(captions, searcher.trained)
    asked = random.Random(seed).sample(asked, min(queries, len(asked)))
    sizes = sorted({size for size in (10, 30, 100, 300, 1000) if size < shortlist} | {shortlist})
    count, found = len(searcher.library), recall(searcher, asked, sizes, progress=True)
    print(f"{library}: {count} clips, {len(asked)} captions; recall@10 of the shortlist against scoring everything:")
    for size, value in found.items():
        print(f"{size:>7} clips  {value:.3f}")
    if count <= 2 * shortlist:
        print(f"(a query scores all {count} clips: the shortlist begins above {2 * shortlist})")
        return 0
    if found[shortlist] < floor:
        print(f"error: {found[shortlist]:.3f} is below --floor {floor:g}: ask with a larger --shortlist.", file=sys.stderr)
    return 0 if found[shortlist] >= floor else 1


# -------------------------------------------------------------------------------------------------------------------------- serve


def application(searcher: Searcher, captions: Sequence[str], hosts: str = r"(localhost|127\.0\.0\.1|\[::1\])"):
    """The web page as a tornado application. It answers for the names `hosts` alone (so no other site can reach it through a visitor's
    browser), reads files of the library alone, by the id of a clip, and writes nothing."""
    import tornado.ioloop
    import tornado.web

    one_at_a_time = ThreadPoolExecutor(1)  # videos go on playing while the model works

    def run(function, *arguments):
        return tornado.ioloop.IOLoop.current().run_in_executor(one_at_a_time, function, *arguments)

    class Page(tornado.web.RequestHandler):
        def set_default_headers(self):
            self.set_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline' data:; frame-ancestors 'none'")
            self.set_header("X-Content-Type-Options", "nosniff")

        def get(self):
            self.finish(_page({"serve": True, "model": searcher.source.name, "examples": list(captions[:200:40])}))

    class Search(Page):
        async def get(self):
            text, k = self.get_query_argument("q", ""), self.get_query_argument("k", "10")
            try:
                hits = await run(searcher.search, text, min(max(int(k), 1), 100) if k.isdecimal() else 10)
            except DataError as error:
                self.set_status(400)
                return self.finish({"error": str(error)})
            shown = [{**asdict(hit), "file": _printable(hit.file), "video": f"clip/{hit.id}", "strip": f"thumbnails/{hit.id}"} for hit in hits]
            self.finish({"hits": shown, "notes": searcher.notes(text)})

    class Captions(Page):
        async def get(self, id):
            clip = await run(searcher.library.clip, id)
            if clip is None:
                raise tornado.web.HTTPError(404)
            best = await run(searcher.captions, clip[1], captions)
            self.finish({"captions": [{"score": score, "caption": caption} for score, caption in best[:10]]})

    class Thumbnails(Page):
        async def get(self, id):
            strips = await run(searcher.library.thumbnails, [id])
            if id not in strips:
                raise tornado.web.HTTPError(404)
            self.set_header("Content-Type", "image/jpeg")
            self.finish(strips[id])

    class Video(tornado.web.StaticFileHandler):  # it knows how to send a part of a file (Range)
        @classmethod
        def get_absolute_path(cls, root, path):
            return path  # an id

        def validate_absolute_path(self, root, absolute_path):
            if searcher.library.clip(absolute_path) is None:
                raise tornado.web.HTTPError(404)
            path = searcher.library.path(searcher.library.names([absolute_path])[0])
            if not path.is_file():
                raise tornado.web.HTTPError(404)
            return str(path)

        @classmethod
        def get_content_version(cls, abspath):
            return stamp(Path(abspath), "")  # instead of a hash of all its bytes

    app = tornado.web.Application()
    id = "([0-9a-f]{24}-[0-9]+)"
    app.add_handlers(hosts, [(r"/", Page), (r"/search", Search), (rf"/captions/{id}", Captions), (rf"/thumbnails/{id}", Thumbnails),
                             (rf"/clip/{id}", Video, {"path": "/"})])  # fmt: skip
    return app


def serve(
    library: str = "library.db",
    port: int = 8000,
    host: str = "127.0.0.1",
    captions: Path | None = None,
    M: int = 20,
    seed: int = 0,
    shortlist: int = SHORTLIST,
    checkpoint: Path | None = None,
    device: str = "auto",
) -> int:
    """A page to search by: type a query, see clips play, click one to see which captions fit it. Ctrl-C ends it.

    Args:
        library: a file that ends in .db, or a Milvus server, http://host:19530
        port: of the page; 0: any that is free
        host: address to listen on; another than 127.0.0.1 shows the library's videos to whoever can reach it
        captions: a text file, a caption a line, to offer for a clip; default: a built-in list
        M: texts drawn for each text-video pair
        seed: of the draws
        shortlist: clips that are scored exactly; a library of at most twice as many is scored whole
        checkpoint: where the library's model is, if it was moved
        device: auto, cpu, cuda
    """
    try:
        import tornado.httpserver
        import tornado.ioloop
        import tornado.netutil
    except ImportError:
        raise DataError("tornado is not installed: pip install -r requirements-search.txt.") from None
    searcher = Searcher(Library(library), checkpoint and Source(str(checkpoint.resolve())), M, seed, shortlist, device)
    searcher.whole  # noqa: B018  read now, not at the first query; an empty library is said here
    local = host in ("127.0.0.1", "localhost", "::1")
    app = application(searcher, read_captions(captions, searcher.trained), *([] if local else [".*"]))
    try:
        sockets = tornado.netutil.bind_sockets(port, host)
    except OSError as error:
        raise DataError(f"{host}:{port} cannot be listened on ({error.strerror}): name another --port.") from None

    async def forever():
        tornado.httpserver.HTTPServer(app).add_sockets(sockets)
        print(f"serving {library} on http://{host}:{sockets[0].getsockname()[1]} (Ctrl-C ends it)", flush=True)
        await tornado.ioloop.asyncio.Event().wait()

    with contextlib.suppress(KeyboardInterrupt):
        tornado.ioloop.asyncio.run(forever())
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: index, query, check or serve. Anything wrong with the input ends it with one sentence and exit code 1."""
    try:
        commands = {"index": index, "query": query, "check": check, "serve": serve}
        sys.exit(tyro.extras.subcommand_cli_from_dict(commands, args=arguments, description=__doc__))
    except ValueError as error:  # DataError, ModelError
        sys.exit(_printable(f"error: {error}"))
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on from here.")
    except Exception as error:
        if not type(error).__module__.startswith("pymilvus"):
            raise
        sys.exit(f"error: the library's database refuses: {str(getattr(error, 'message', error)).splitlines()[0]}")


if __name__ == "__main__":
    main()
