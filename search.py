"""Search your own videos with T-MASS ("Inference Pipeline"): clips for a text, or captions for a clip.

    python search.py index FOLDER                                    # encode every clip once, into library.db
    python search.py query "a red ring grows in the desert" --html found.html
    python search.py query --video clip.mp4 --captions captions.txt  # which captions fit a clip
    python search.py check                                           # what the shortlist misses
    python search.py serve                                           # a page on http://127.0.0.1:8000

A library is a local folder, or a Milvus server: --library http://host:19530. A query first finds a shortlist
by vector search, the text t against one vector per clip. The exact score then ranks the shortlist: the best
of M texts drawn for each text-video pair. A small library is scored in full. Needs requirements-search.txt.
"""

import collections
import contextlib
import functools
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm.auto import tqdm

import shapes
from data import center_crop, normalise
from engine import ffmpeg, server
from engine.backbone import autocast, count_tokens, load_clip, tokenize, unknown_words
from engine.checkpoint import latest_run, open_checkpoint
from engine.config import EvaluationConfig, prior_of
from engine.datasets import Clip, read_lines
from engine.distributed import choose_device
from engine.files import DataError, ModelError, printable
from engine.folder import Folder, scan
from engine.frames import decode_frames, in_parallel
from engine.library import Hit, Library, filmstrip, identity, overall, span, stamp
from engine.scenes import spans
from engine.scoring import noise_bank, scores
from model import TMASS

SHORTLIST = 1000  # clips that are scored exactly; a library of at most twice as many is scored in full
LONGEST = 2000  # characters of a query, at most; the model reads 77 tokens
LIMITS: dict[str, tuple[int, float]] = {
    **dict.fromkeys(("k", "shortlist", "queries"), (1, math.inf)),
    **dict(M=(0, 10_000), seed=(0, 2**63 - 1), batch=(1, 10_000), num_frames=(1, 1000), port=(0, 65_535)),
    **dict(max_pixels=(1, math.inf), time_limit=(0, math.inf)),
}

# --------------------------------------------------------------------------------- the model, and its answers


@dataclass(frozen=True)
class Source:
    """A checkpoint, or CLIP alone with mean pooling (zero-shot). A library stores the source of its model."""

    checkpoint: str | None = None
    arch: str | None = None
    weights: str | None = None
    num_frames: int = 12

    def open(self, device: torch.device) -> tuple[TMASS, dict]:
        """The model in eval mode, and the config it was trained with. Raises ModelError."""
        if self.checkpoint:
            model, trained, _ = open_checkpoint(Path(self.checkpoint))
        else:
            clip, trained = load_clip(self.arch, self.weights), {}
            model = TMASS(clip, fusion="mean", radius="none", num_frames=self.num_frames)
        return model.to(device).eval(), trained

    @property
    def name(self) -> str:
        """The name to print."""
        return self.checkpoint or f"{self.arch}, zero-shot (CLIP's features, mean-pooled; no text mass)"


@dataclass(frozen=True)
class SearchConfig:
    """Which library to search, and how its clips are scored."""

    library: str = "library.db"  # a folder that ends in .db, or a Milvus server, http://host:19530
    M: int = 20  # texts drawn for each text-video pair; 0 scores t itself
    seed: int = 0  # seed of the draws
    shortlist: int = SHORTLIST  # clips scored exactly; a library of up to twice as many is scored in full
    captions: Path | None = None  # text file with one caption per line, for a clip; default: a built-in list
    checkpoint: Path | None = None  # where the library's model is now, if it was moved
    device: str = "auto"  # auto, cpu, cuda


def check_limits(config: object) -> None:
    """Raises DataError for a flag that is outside of LIMITS."""
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(config, name, low) <= high:
            flag = "-k" if name == "k" else f"--{name.replace('_', '-')}"
            most = f", at most {high}" if high < math.inf else ""
            raise DataError(f"{flag} must be {low} or more{most}.")


class Searcher:
    """A library, opened together with the model that encoded its clips. Raises DataError and ModelError."""

    def __init__(self, config: SearchConfig):
        check_limits(config)
        self.library, self.shortlist = Library(config.library), config.shortlist
        self.device, own = choose_device(config.device), Source(**self.library.about["source"])
        source = Source(str(config.checkpoint.resolve())) if config.checkpoint else own
        self.name, self.zero_shot = source.name, source.arch is not None
        self.model, self.trained = source.open(self.device)
        _check_identity(self.library, self.model, self.name)
        prior = prior_of(EvaluationConfig(), self.trained, self.trained.get("dataset", ""))
        M = config.M if self.model.radius is not None else 0
        self.noise = noise_bank(M, self.library.about["dim"], config.seed, **prior).to(self.device)
        self._captions = functools.lru_cache(1)(self.text)

    def notes(self, query: str) -> list[str]:
        """Warnings about a query: it is cut, or probably not English."""
        count, most = count_tokens(query[:LONGEST]), self.model.clip.context_length
        cut = f"the query has {count} tokens; the model reads the first {most}."
        foreign = "CLIP learned from English captions: a query in another language may find little."
        unknown = unknown_words(self.model.clip, query[:LONGEST])
        strange = f"the model does not know {', '.join(unknown[:5])}: the score leaves that out."
        foreign = [foreign] * bool(re.search(r"[^\W\d_a-zA-Z]", query))
        return [cut] * (count > most) + foreign + [strange] * bool(unknown)

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """phi_t of captions. Raises DataError if one is empty, ModelError if the features are not finite."""
        if not all(caption.strip() for caption in captions):
            raise DataError("the query is empty: describe what to look for.")
        tokens = tokenize(captions, self.model.clip.context_length)
        text = torch.cat([self.model.encode_text(part.to(self.device)) for part in tokens.split(256)])
        return _finite(text, f"{self.name} gives text features")

    @functools.cached_property
    def whole(self) -> tuple[list[dict], Float[Tensor, "clips frames dim"]] | None:
        """All clips of a small library; None for a larger one. Raises DataError for an empty library."""
        count = len(self.library)
        if count == 0:
            raise DataError(f"{self.library.where} holds no clip: index a folder of videos first.")
        if count > 2 * self.shortlist:
            return None
        batches = list(self.library.batches())
        return [row for rows, _ in batches for row in rows], torch.cat([frames for _, frames in batches])

    def score(
        self, text: Float[Tensor, "texts dim"], frames: Float[Tensor, "clips frames dim"]
    ) -> Float[Tensor, "texts clips"]:
        """The exact score of every pair, as in evaluate.py. Raises ModelError if one is not finite."""
        score = scores(self.model, text, frames.to(self.device), self.noise)
        return _finite(score, f"{self.name} and {self.library.where} give scores")

    @torch.no_grad()
    def search(self, query: str, k: int = 5) -> list[Hit]:
        """The k best clips for a query, best first; among equal scores, the smaller id first."""
        if len(query) > LONGEST:
            raise DataError(f"the query has {len(query)} characters: use at most {LONGEST}.")
        text, psi, radius = self.text([query]), self.model.fusion, self.model.radius
        rows, frames = self.whole or self.library.nearest(text[0], self.shortlist)
        score = self.score(text, frames)[0].tolist()
        best = sorted(range(len(rows)), key=lambda n: (-score[n], rows[n]["id"]))[:k]
        found = frames[best].to(self.device)
        weights = torch.full(found.shape[:2], 1 / found.shape[1])  # (clips, frames)
        if inspect.ismethod(getattr(psi, "attention", None)):  # as XPool's: (texts, clips, heads, frames)
            weights = psi.attention(text, found)[0].mean(dim=1)
        radii = [None] * len(best)
        if radius is not None:
            radii = radius(text, found, psi(text, found))[0].mean(dim=-1).tolist()
        names = self.library.names([rows[n]["id"] for n in best])
        return [
            Hit(rank, score[n], rows[n]["id"], name, rows[n]["start"], rows[n]["end"], attention, R)
            for rank, (n, name, attention, R) in enumerate(zip(best, names, weights.tolist(), radii), start=1)
        ]

    def rank(self, captions: Sequence[str], clip: Float[Tensor, "1 frames dim"]) -> list[dict]:
        """Video-to-text: captions for one clip, [{"score", "caption"}], best first.

        The features of the captions are kept for the next clip."""
        score = self.score(self._captions(tuple(captions)), clip)[:, 0].tolist()
        answers = [{"score": s, "caption": caption} for s, caption in zip(score, captions)]
        return sorted(answers, key=lambda answer: -answer["score"])


def _finite(values: Tensor, what: str) -> Tensor:
    if not values.isfinite().all():
        damage = "that are not finite numbers: its weights are damaged"
        raise ModelError(f"{what} {damage}; index again with another --checkpoint and --library.")
    return values


def _check_identity(library: Library, model: TMASS, name: str) -> str:
    """The identity of the model. Raises DataError if the library was made by another one."""
    if library.about.get("model", found := identity(model)) != found:
        own, advice = Source(**library.about["source"]).name, "name that model, or use another --library"
        raise DataError(f"{library.where} was made by another model ({own}) than {name} is now: {advice}.")
    return found


def read_captions(path: Path | None, trained: dict) -> list[str]:
    """The lines of a file, each once. Without a file: captions of built-in clips for a model trained on them,
    else everyday sentences. Raises DataError for a missing or empty file."""
    if path is not None:
        if not path.is_file():
            raise DataError(f"{path} not found: name a text file with one caption per line with --captions.")
        if not (lines := read_lines(path)):
            raise DataError(f"{path} holds no caption: write one caption per line.")
        return list(dict.fromkeys(lines))
    if trained.get("dataset") == "shapes":
        clips = (shapes.make_clip(0, number) for number in range(100_000, 100_100))
        return list(dict.fromkeys(caption.text for clip in clips for caption in clip.captions))
    who = "a man, a woman, a child, two people, a crowd, a dog, a cat, a bird"
    does = "is running, is talking, is sitting still, is jumping, is playing, is eating, moves slowly"
    does += ", turns around"
    where = "in a kitchen, in a street, on a beach, in the snow, in a forest, on a stage, in a car, at night"
    return list(map(" ".join, itertools.product(*(words.split(", ") for words in (who, does, where)))))


# ------------------------------------------------------------------------------------------------------ index


def read_clip(clip: Clip, num_frames: int, size: int) -> tuple[UInt8[Tensor, "frames 3 size size"], bytes]:
    """The frames of a clip at CLIP's size, and its filmstrip. Raises DataError."""
    pictures = decode_frames(clip.path, num_frames, clip.start, clip.end, size)
    images = [torch.tensor(picture).permute(2, 0, 1)[None] for picture in pictures]  # sizes may differ
    return torch.cat([center_crop(image, size) for image in images]), filmstrip(pictures)


@torch.no_grad()
def encode(model: TMASS, images: UInt8[Tensor, "clips frames 3 h w"]) -> Float[Tensor, "clips frames dim"]:
    """phi_v of the frames of clips, on the model's device."""
    device = model.logit_scale.device
    with autocast(device, "auto"):
        return model.encode_frames(normalise(images.to(device)))


def _attempt(work: Callable, *arguments):
    """work(*arguments); a DataError is returned instead of raised."""
    try:
        return work(*arguments)
    except DataError as error:
        return error


def _add(db: Library, model: TMASS, files: dict[str, Path], rows: dict, batch: int, bar: tqdm) -> None:
    """Reads, encodes and stores the clips of files. Each file's row gets their number and the first error."""
    clips: list[tuple[str, Clip]] = []
    split = in_parallel(lambda file: _attempt(spans, files[file], db.about["cut"]), [*files], "splitting")
    for file, parts in zip(files, split):
        if isinstance(parts, DataError):
            _failed(rows[file], files[file], parts)
            parts = []
        bar.total += len(parts) - 1
        own = [Clip(f"{db.key(file)}-{n}", files[file], (), "", *part) for n, part in enumerate(parts)]
        clips += [(file, clip) for clip in own]
    sizes = model.arguments["num_frames"], model.resolution
    for part in (clips[n : n + batch] for n in range(0, len(clips), batch)):
        read, good = in_parallel(lambda pair: _attempt(read_clip, pair[1], *sizes), part, "decoding"), []
        for (file, clip), result in zip(part, read):
            if isinstance(result, DataError):
                _failed(rows[file], files[file], result)
            else:
                rows[file]["clips"] += 1
                good.append((clip, *result))
        if good:
            features = encode(model, torch.stack([images for _, images, _ in good]))
            ids = [(clip.id, clip.start, clip.end) for clip, _, _ in good]
            db.add(ids, overall(model, features), features, [strip for _, _, strip in good])
        bar.update(len(part))


def _failed(row: dict, path: Path, error: DataError) -> None:
    """Notes the first error of a file in its row. A file that is gone meanwhile counts as unfinished."""
    row["error"] = row["error"] or str(error)
    if not path.is_file():
        row["stamp"] = ""


@dataclass(frozen=True)
class IndexConfig:
    """Which folder to index, with which model, and how files are split into clips."""

    folder: tyro.conf.Positional[Path]  # videos, at any depth
    library: str = "library.db"  # a folder that ends in .db, or a Milvus server, http://host:19530
    checkpoint: Path | None = None  # a run or checkpoint; default: the library's own, else the latest run
    arch: str | None = None  # instead: ViT-B/32 or another CLIP, zero-shot, with mean-pooled frames
    weights: Path | None = None  # with --arch: a file of CLIP weights
    num_frames: int = 12  # with --arch: frames per clip
    window: float | None = None  # seconds per clip, about; 0: whole files; default: as the library was split
    scenes: bool = False  # split files into scenes (scenedetect)
    moved: bool = False  # the library's folder was moved to this place
    retry: bool = False  # read broken files again, even if they have not changed
    max_pixels: int = ffmpeg.MAX_PIXELS  # of a frame; a video with larger frames is refused
    time_limit: float = ffmpeg.TIME_LIMIT  # seconds to read a file, plus 300 a MiB of it; longer: refused
    hidden: bool = False  # also take hidden, trash and thumbnail folders and hidden files
    batch: int = 16  # clips encoded at once
    device: str = "auto"  # auto, cpu, cuda


def index(config: IndexConfig) -> int:
    """Creates or updates the library of a folder: encodes new and changed files, drops removed ones.

    Broken files are listed. If index was stopped, run it again to continue. Files that cannot be reached now,
    in a folder without the right to read it or on a disk that is away, are kept and warned of.
    Exit code 1: there is no clip, or something cannot be reached."""
    folder = config.folder
    check_limits(config)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: name the folder of your videos.")
    if (config.scenes and config.window is not None) or not 0 <= (config.window or 0) < float("inf"):
        raise DataError("--window takes seconds, 0 or more, and not beside --scenes.")
    ffmpeg.check_ffmpeg()
    ffmpeg.set_limits(config.max_pixels, config.time_limit)
    found = scan(folder, config.hidden)
    if not found.videos and "://" not in config.library and not os.path.exists(config.library):
        raise DataError(found.nothing())
    db, place = Library(config.library, create=True), str(folder.resolve())
    if not found.videos and not db.about:
        raise DataError(found.nothing())
    if (old := db.about.get("folder", place)) != place and not config.moved:
        advice = f"name another --library, or add --moved if that folder is now {folder}."
        raise DataError(f"{db.where} is the library of {old}: {advice}")
    source = _source(config, db)
    model, _ = source.open(choose_device(config.device))
    about = {"folder": place, "source": asdict(source), "model": _check_identity(db, model, source.name)}
    print(f"model: {source.name}", file=sys.stderr)
    cut = "scenes" if config.scenes else db.about.get("cut", "whole")
    if config.window is not None:
        cut = f"window {config.window:g}" if config.window else "whole"
    db.describe({**about, "cut": cut, "dim": model.clip.text_projection.shape[1]})
    return _update(db, model, found, config)


def _update(db: Library, model: TMASS, found: Folder, config: IndexConfig) -> int:
    """Makes the library equal to what was found, and prints what changed. Returns the exit code."""
    known, started, batch = db.files(), time.time(), config.batch
    stamps = {file: stamp(status, db.about["cut"]) for file, status in found.videos.items()}
    same = {file for file, row in known.items() if row["stamp"] == stamps.get(file)}
    same -= {file for file in same if config.retry and known[file]["error"]}
    todo = [file for file in stamps if file not in same]
    away = {file: found.away(file, row.get("mount")) for file, row in known.items() if file not in stamps}
    gone = [file for file, where in away.items() if where is None]
    kept = collections.Counter(where for where in away.values() if where is not None)
    for note in found.notes():
        print(printable(note))
    for warning in found.warnings(kept):
        print(printable(f"warning: {warning}"), file=sys.stderr)
    db.drop(gone)
    with tqdm(total=len(todo), desc="clips", unit=" clips", disable=not todo) as bar:
        for group in (todo[n : n + batch] for n in range(0, len(todo), batch)):
            db.begin(group, known)
            rows = {file: {"stamp": stamps[file], "clips": 0, "error": None} for file in group}
            rows = {file: {**row, "mount": found.mounts[file]} for file, row in rows.items()}
            _add(db, model, {file: config.folder / file for file in group}, rows, batch, bar)
            db.finish(rows)
    seconds, files, count = time.time() - started, db.files(), len(db)
    clips, new = sum(files[file]["clips"] for file in todo), sum(file not in known for file in todo)
    broken = [row["error"] for row in files.values() if row["error"]]
    changes = f"{new} new, {len(todo) - new} read again, {len(gone)} removed, {len(same)} unchanged"
    changes += f", {len(broken)} broken" + (f", {kept.total()} kept" if kept else "")
    rate = f", {clips} clips encoded in {seconds:.1f} s ({clips / seconds:.1f} clips/s)" if clips else ""
    print(f"{db.where}: {count} clips of {len(files)} files; {changes}{rate}")
    for error in broken:
        print(printable(f"broken: {error}"))
    return 1 if kept or found.unreadable or not count else 0


def _source(config: IndexConfig, db: Library) -> Source:
    """The model to index with: the one that is named, else the library's own, else the latest run."""
    if config.checkpoint or config.arch:
        checkpoint, weights = (path and str(path.resolve()) for path in (config.checkpoint, config.weights))
        return Source(checkpoint, config.arch, weights, config.num_frames)
    return Source(**db.about["source"]) if db.about else Source(str(latest_run().resolve()))


# ------------------------------------------------------------------------------------------------------ query


@dataclass(frozen=True)
class QueryConfig(SearchConfig):
    """What to search for, and how to show what was found."""

    text: tyro.conf.Positional[str] = ""  # what to look for
    k: Annotated[int, tyro.conf.arg(aliases=("-k",))] = 5  # how many to show
    json: bool = False  # print JSON
    html: Path | None = None  # also write one page; it links to the videos and holds everything else
    video: str | None = None  # rank captions for a file of the library (name below its folder), or any video


def query(config: QueryConfig) -> int:
    """Finds the clips that fit a text, or with --video the captions that fit a clip."""
    check_limits(config)
    if not config.text.strip() and config.video is None:
        raise DataError('the query is empty: give a text, as in query "a dog runs", or a clip with --video.')
    searcher = Searcher(config)
    if config.video is not None:
        return _query_video(searcher, config)
    for note in [searcher.name] * searcher.zero_shot + searcher.notes(config.text):
        print(f"note: {note}", file=sys.stderr)
    hits = searcher.search(config.text, config.k)
    if config.html is not None:
        server.write_page(config.html, searcher, config.text, hits)
        print(f"written: {config.html}", file=sys.stderr)
    if config.json:
        print(json.dumps([asdict(hit) for hit in hits], indent=2))
        return 0
    print("rank  score  radius  file")
    for hit in hits:
        radius, part = "-" if hit.radius is None else f"{hit.radius:.3f}", span(hit.start, hit.end)
        print(printable(f"{hit.rank:>4}  {hit.score:.3f}  {radius:>6}  {hit.file}  {part}"))
    return 0


def _query_video(searcher: Searcher, config: QueryConfig) -> int:
    video, captions = config.video, read_captions(config.captions, searcher.trained)
    names = [video, *(unicodedata.normalize(form, video) for form in ("NFC", "NFD"))]  # macOS writes NFD
    known = (searcher.library.clips_of(name) for name in names)
    rows, frames = next(((rows, frames) for rows, frames in known if rows), ([], None))
    if not rows:
        if not os.path.isfile(video):
            raise DataError(f"{video} is neither a file of {config.library} nor another file: name a video.")
        clip = Clip(video, Path(video), (), "")
        images, _ = read_clip(clip, searcher.model.arguments["num_frames"], searcher.model.resolution)
        rows, frames = [{"start": 0.0, "end": None}], encode(searcher.model, images[None])
    best = [searcher.rank(captions, clip)[: config.k] for clip in frames.split(1)]
    parts = [{"file": video, "start": row["start"], "end": row["end"]} for row in rows]
    if config.json:
        print(json.dumps([{**part, "captions": own} for part, own in zip(parts, best)], indent=2))
        return 0
    for part, own in zip(parts, best):
        print(printable(f"{video}  {span(part['start'], part['end'])}"))
        for n, one in enumerate(own, start=1):
            print(printable(f"{n:>4}  {one['score']:.3f}  {one['caption']}"))
    return 0


# ------------------------------------------------------------------------------------------------------ check


@dataclass(frozen=True)
class CheckConfig(SearchConfig):
    """How to measure the shortlist."""

    queries: int = 100  # captions to search for, drawn with --seed
    floor: float = 0.95  # smallest recall@10 that passes


def recall(searcher: Searcher, captions: Sequence[str], sizes: list[int], k: int = 10) -> dict[int, float]:
    """For each size of the shortlist: the fraction of the library's k best clips that it holds, mean over
    captions. Raises DataError for an empty library."""
    text, ids, parts = searcher.text(captions), [], []
    for rows, frames in tqdm(searcher.library.batches(), "scoring everything", unit=" batches", leave=False):
        ids += [row["id"] for row in rows]
        parts.append(searcher.score(text, frames).cpu())
    if not ids:
        raise DataError(f"{searcher.library.where} holds no clip: index a folder of videos first.")
    best = torch.cat(parts, dim=1).topk(min(k, len(ids)), dim=1).indices.tolist()
    found = dict.fromkeys(sizes, 0)
    for t, own in zip(text, best):
        order = searcher.library.nearest_ids(t, max(sizes))
        for size in sizes:
            found[size] += len({ids[n] for n in own} & {*order[:size]})
    return {size: count / sum(map(len, best)) for size, count in found.items()}


def check(config: CheckConfig) -> int:
    """Measures what shortlists of several sizes miss: their recall@10 against scoring every clip.
    Exit code 1: that of --shortlist is below --floor."""
    searcher, size = Searcher(config), config.shortlist
    asked = read_captions(config.captions, searcher.trained)
    asked = random.Random(config.seed).sample(asked, min(config.queries, len(asked)))
    sizes = [smaller for smaller in (10, 30, 100, 300, 1000) if smaller < size] + [size]
    count, found = len(searcher.library), recall(searcher, asked, sizes)
    what = "recall@10 of the shortlist against scoring everything"
    print(f"{config.library}: {count} clips, {len(asked)} captions; {what}:")
    print("\n".join(f"{size:>7} clips  {value:.3f}" for size, value in found.items()))
    if count <= 2 * size:
        print(f"(a query scores all {count} clips: the shortlist is used above {2 * size})")
    elif found[size] < config.floor:
        advice = "use a larger --shortlist"
        print(f"error: {found[size]:.3f} is below --floor {config.floor:g}: {advice}.", file=sys.stderr)
        return 1
    return 0


# ------------------------------------------------------------------------------------------------------ serve


@dataclass(frozen=True)
class ServeConfig(SearchConfig):
    """Where to serve the page."""

    port: int = 8000  # port of the page; 0: any free one
    host: str = "127.0.0.1"  # address to listen on; any other shows the videos to whoever can reach it
    links: bool = False  # also play files that links lead to outside the library's folder


def serve(config: ServeConfig) -> int:
    """Serves a page: type a query, play the clips it finds, see which captions fit a clip. Ctrl-C ends it."""
    searcher = Searcher(config)
    searcher.whole  # noqa: B018  loads the clips now, and raises DataError for an empty library
    captions = read_captions(config.captions, searcher.trained)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve(searcher, captions, config.host, config.port, config.links)
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Wrong input ends it with one sentence and exit code 1."""
    commands = {"index": index, "query": query, "check": check, "serve": serve}
    for stream in (sys.stdout, sys.stderr):  # as in engine/__init__.py, if they were replaced since
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    cli = functools.partial(tyro.extras.subcommand_cli_from_dict, config=(tyro.conf.OmitArgPrefixes,))
    try:
        sys.exit(cli(commands, args=arguments, description=__doc__))
    except ValueError as error:  # DataError, ModelError
        sys.exit(printable(f"error: {error}"))
    except KeyboardInterrupt:
        sys.exit("stopped: the same command continues from here.")
    except OSError as error:
        sys.exit(
            printable(f"error: {error.filename or 'a file'} cannot be used ({error.strerror or error}).")
        )
    except Exception as error:
        if not type(error).__module__.startswith("pymilvus"):
            raise
        reason = str(getattr(error, "message", error)).splitlines()[0]
        sys.exit(f"error: the library's database reports: {reason}; what it holds is kept.")


if __name__ == "__main__":
    main()
