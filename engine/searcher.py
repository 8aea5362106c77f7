"""The model of a library and its answers: clips for a text, captions for a clip ("Inference Pipeline").

A query first finds a shortlist by vector search; the exact score of `evaluate.scores` ranks it. A small
library is scored in full, and so is any library for a query of several parts, of a picture, or of some files
only (engine/queries.py).
"""

import functools
import inspect
import itertools
import math
import random
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

import shapes
from data import center_crop, normalise
from engine.backbone import autocast, count_tokens, load_clip, tokenize, unknown_words
from engine.checkpoint import open_checkpoint
from engine.config import EvaluationConfig, prior_of
from engine.datasets import Clip, read_lines
from engine.distributed import choose_device
from engine.ffmpeg import check_shape
from engine.files import VIDEO_SUFFIXES, DataError, ModelError
from engine.firstpass import PIECE, SAMPLE, FirstLook
from engine.frames import decode_frames, duration, resize
from engine.library import Library, Rows, filmstrip, identity, stamp
from engine.pictures import read_picture
from engine.queries import (
    Hit,
    Query,
    build_query,
    eligible,
    fold,
    similarity,
    small_frames,
    split_time,
    unfit,
)
from engine.scoring import noise_bank, scores
from model import TMASS

SHORTLIST = 1000  # clips of a vector search that are scored exactly; of up to twice as many all are
EXACT = 8192  # clips that are scored exactly after a first look at all
LONGEST = 2000  # characters of a query, at most; the model reads 77 tokens
RANDOM = 50  # captions whose best scores tell when nothing fits well
LIMITS: dict[str, tuple[int, float]] = {
    **dict.fromkeys(("k", "shortlist", "queries"), (1, math.inf)),
    **dict(M=(0, 10_000), seed=(0, 2**63 - 1), batch=(1, 10_000), num_frames=(1, 1000), port=(0, 65_535)),
    **dict(max_pixels=(1, math.inf), time_limit=(0, math.inf)),
}


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
    shortlist: int | None = None
    """clips found by vector search and scored exactly; default: see docs/search.md"""
    captions: Path | None = None  # text file with one caption per line, for a clip; default: a built-in list
    checkpoint: Path | None = None  # where the library's model is now, if it was moved
    device: str = "auto"  # auto, cpu, cuda
    features: Path | None = None  # with a server: the folder of the features, which every process sees


def check_limits(config: object) -> None:
    """Raises DataError for a flag that is outside of LIMITS."""
    for name, (low, high) in LIMITS.items():
        if (value := getattr(config, name, None)) is not None and not low <= value <= high:
            flag = "-k" if name == "k" else f"--{name.replace('_', '-')}"
            most = f", at most {high}" if high < math.inf else ""
            raise DataError(f"{flag} must be {low} or more{most}.")


class Searcher:
    """A library, opened together with the model that encoded its clips. Raises DataError and ModelError.

    opened: the library, its model and the config that this was trained with, where they are open already."""

    def __init__(self, config: SearchConfig, opened: tuple[Library, TMASS, dict] | None = None):
        check_limits(config)
        self.library = opened[0] if opened else Library(config.library, features=config.features)
        self.by_vectors = config.shortlist is not None or self.library.server is not None
        self.shortlist = config.shortlist or self.library.about.get("shortlist", SHORTLIST)
        self.device, own = choose_device(config.device), Source(**self.library.about["source"])
        source = Source(str(config.checkpoint.resolve())) if config.checkpoint else own
        self.name, self.zero_shot = source.name, source.arch is not None
        self.model, self.trained = opened[1:] if opened else source.open(self.device)
        check_identity(self.library, self.model, self.name)
        prior = prior_of(EvaluationConfig(), self.trained, self.trained.get("dataset", ""))
        M = config.M if self.model.radius is not None else 0
        self.noise = noise_bank(M, self.library.about["dim"], config.seed, **prior).to(self.device)
        self._captions = functools.lru_cache(1)(self.text)  # of video-to-text
        self._features = functools.lru_cache(8)(lambda texts: self.text(texts))  # of queries

    def notes(self, query: str | Query, hits: Sequence[Hit] = ()) -> list[str]:
        """Warnings about a query: it is cut, probably not English, or nothing that was found fits well."""
        query = build_query(query) if isinstance(query, str) else query
        notes = list(dict.fromkeys(note for part in query.texts for note in self._notes(part.text)))
        fit = self.library.about.get("fit", {})
        if hits and query.plain is not None and fit.get("M") == len(self.noise):
            notes += filter(None, [unfit(hits[0].score, fit["best"])])
        return notes

    def _notes(self, text: str) -> list[str]:
        count, most = count_tokens(text[:LONGEST]), self.model.clip.context_length
        cut = f"the query has {count} tokens; the model reads the first {most}."
        foreign = "CLIP learned from English captions: a query in another language may find little."
        unknown = unknown_words(self.model.clip, text[:LONGEST])
        strange = f"the model does not know {', '.join(unknown[:5])}: the score leaves that out."
        foreign = [foreign] * bool(re.search(r"[^\W\d_a-zA-Z]", text))
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

    def total(self, query: Query, frames: Float[Tensor, "clips frames dim"]) -> Float[Tensor, " clips"]:
        """The score of clips for a query: over its parts, the sum of weight times score or similarity."""
        total = torch.zeros(len(frames), device=self.device)
        if query.texts:
            weights = torch.tensor([part.weight for part in query.texts], device=self.device)
            score = self.score(self._features(tuple(part.text for part in query.texts)), frames)
            total += (weights[:, None] * score).sum(dim=0)
        for part in query.parts:
            if part.frames is not None:
                like = similarity(part.frames.to(self.device), frames.to(self.device))
                total += part.weight * like.amax(dim=-1).mean(dim=-1)
        return total

    @functools.cached_property
    def _look(self) -> FirstLook:
        return FirstLook(self.model)

    def first(self, text: Float[Tensor, "1 dim"]) -> Iterable[Rows]:
        """The clips to score exactly for a text: the best of a first look at all clips (engine/firstpass.py),
        all of them if it is not possible or not needed, or the nearest by vector search."""
        library, state = self.library, self.library.state
        if self.by_vectors:
            return [library.nearest(text[0], self.shortlist)]
        if len(state) <= EXACT or not FirstLook.knows(self.model):
            return library.batches()
        _, sample = library.clips(state, np.linspace(0, len(state) - 1, SAMPLE).astype(int))
        look = self._look.fit(text, self.noise, sample.to(self.device))
        found = look.all_scores(state.pieces(PIECE))[state.among_pieces()]
        return [library.clips(state, found.topk(EXACT).indices.numpy(), torch.half)]  # as they are stored

    def candidates(self, query: Query) -> tuple[list[dict], Float[Tensor, "clips frames dim"], list[float]]:
        """The clips that may answer a query, with their features and scores. No better one is left out,
        except by `first` for a query that is one text."""
        library, keys, whole = self.library, None, self.whole
        batches = [whole] if whole is not None else library.batches()
        if query.filtered:
            names, state = eligible(library.files(), library.about["folder"], query), library.state
            keys = {library.key(name) for name in names}
            if whole is None:
                numbers = np.concatenate([state.of_file(name) for name in names])
                parts = (numbers[n : n + 1000] for n in range(0, len(numbers), 1000))
                batches = (library.clips(state, part) for part in parts)
        elif whole is None and query.plain is not None:
            batches = self.first(self._features((query.plain,)))
        rows, frames, score = [], torch.empty(0), []
        for some, features in batches:
            may = [n for n, row in enumerate(some) if row["id"] not in query.without]
            may = may if keys is None else [n for n in may if some[n]["id"].split("-")[0] in keys]
            if may:
                own = features if len(may) == len(some) else features[may]
                rows, score = rows + [some[n] for n in may], score + self.total(query, own).tolist()
                frames = torch.cat([frames, own]) if len(frames) else own
            if whole is None and len(rows) > self.shortlist:
                best = _ranked(rows, score)[: self.shortlist]
                rows, frames, score = [rows[n] for n in best], frames[best], [score[n] for n in best]
        return rows, frames, score

    @torch.no_grad()
    def search(self, query: str | Query, k: int = 5) -> list[Hit]:
        """The k best clips for a query, best first; among equal scores, the smaller id first.

        Near-duplicates of a better clip are listed with it, unless query.all; a text alone shows all."""
        query = build_query(query, all=True) if isinstance(query, str) else query
        for part in query.texts:
            if len(part.text) > LONGEST:
                raise DataError(f"the query has {len(part.text)} characters: use at most {LONGEST}.")
        rows, frames, score = self.candidates(query)
        if not rows:
            return []
        order = _ranked(rows, score)
        groups = [[n] for n in order[:k]] if query.all else self._folded(rows, order, k, frames.shape[1])
        best = [group[0] for group in groups]
        weights, numbers, radii = self._looks(query, frames[best].to(self.device, torch.float))
        shown = [n for group in groups for n in group]
        files = dict(zip(shown, self.library.file_rows([rows[n]["id"] for n in shown])))
        hits = []
        for rank, (n, *copies) in enumerate(groups, start=1):
            start, end, file, frame = rows[n]["start"], rows[n]["end"], files[n], numbers[rank - 1]
            until = self._length(file["file"], file["stamp"]) if end is None else end
            time = None if until is None else start + (frame + 0.5) / frames.shape[1] * (until - start)
            same = [{"file": files[c]["file"], **_span(rows[c]), "score": score[c]} for c in copies]
            found = score[n], rows[n]["id"], file["file"], start, end, weights[rank - 1], radii[rank - 1]
            hits.append(Hit(rank, *found, frame, time, same))
        return hits

    def _looks(self, query: Query, frames: Tensor) -> tuple[list[list[float]], list[int], list[float | None]]:
        """Of each hit: the weight of each frame, the number of the best one, the mean radius."""
        psi, radius, parts = self.model.fusion, self.model.radius, [p for p in query.parts if p.weight > 0]
        weights = fits = torch.zeros(frames.shape[:2], device=self.device)  # (clips, frames)
        radii = [None] * len(frames)
        for part in parts:
            share = part.weight / sum(part.weight for part in parts)
            if part.frames is not None:  # each frame gives its weight to the one that is most like it
                cosine = similarity(part.frames.to(self.device), frames)
                own = F.one_hot(cosine.argmax(dim=-1), cosine.shape[-1]).float().mean(dim=1)
                fit = own + 1e-3 * cosine.mean(dim=1)
            else:
                text = self._features((part.text,))
                if inspect.ismethod(
                    getattr(psi, "attention", None)
                ):  # as XPool's: (texts, clips, heads, ...)
                    own = fit = psi.attention(text, frames)[0].mean(dim=1)
                else:
                    own = torch.full_like(weights, 1 / frames.shape[1])
                    fit = similarity(text, frames)[:, 0]
                if radius is not None and part is query.parts[0]:
                    radii = radius(text, frames, psi(text, frames))[0].mean(dim=-1).tolist()
            weights, fits = weights + share * own, fits + share * fit
        return weights.tolist(), fits.argmax(dim=1).tolist(), radii

    def _folded(self, rows: list[dict], order: list[int], k: int, count: int) -> list[list[int]]:
        """The ranked clips as at most k groups of near-duplicates, by their filmstrips of `count` frames."""
        small, ahead = {}, max(10, 2 * k)

        def look(n: int):
            if n not in small:  # some at once, and each once
                ids = [rows[m]["id"] for m in order[n : n + ahead]]
                strips = self.library.thumbnails(ids)  # without those that were just removed
                looks = [small_frames(strips[id], count) if id in strips else None for id in ids]
                small.update(enumerate(looks, start=n))
            return small[n]

        return [[order[n] for n in group] for group in fold(len(order), k, look)]

    @functools.lru_cache(4096)  # noqa: B019  a searcher lives as long as its process
    def _length(self, file: str, indexed: str) -> float | None:
        """Seconds of a file; None if it is gone or has changed."""
        try:
            path = self.library.path(file)
            return duration(path) if indexed.startswith(stamp(path, "")) else None
        except (DataError, OSError):
            return None

    # ---- pictures and clips in place of a text

    @torch.no_grad()
    def picture(self, path: Path) -> Float[Tensor, "1 dim"]:
        """phi_v of a picture; of an animation, its middle frame. Raises DataError."""
        try:
            frame = read_picture(path, 1)[0]
            check_shape(path, *frame.shape[:2])
        except DataError as error:
            video = path.suffix.lower() in VIDEO_SUFFIXES
            reason = re.sub(r"(,? or|:) delete its rows\.$", ".", str(error))
            raise DataError(f"{path} is a video: name it with --like." if video else reason) from None
        size = self.model.resolution
        image = center_crop(torch.tensor(resize(frame, size)).permute(2, 0, 1)[None], size)
        return _finite(encode(self.model, image[None])[0], f"{self.name} gives picture features")

    def picture_of(self, content: bytes) -> Float[Tensor, "1 dim"]:
        """The same of the bytes of a picture. Raises DataError."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "the picture")
            path.write_bytes(content)
            try:
                return self.picture(path)
            except DataError as error:
                raise DataError(str(error).replace(str(path), path.name)) from None

    def like(self, name: str) -> tuple[Float[Tensor, "own dim"], frozenset[str]]:
        """What CLIP[@SECONDS] looks like: the features of its frames, or of the one on screen then; and the
        ids of this clip in the library. CLIP is a file of the library, or any video. Raises DataError."""
        (rows, frames), time = self.clips_of(name), None
        if not rows and not Path(name).is_file():
            name, time = split_time(name)
            rows, frames = self.clips_of(name)
        path = self.library.path(name) if rows else Path(name)
        if not rows and not path.is_file():
            raise DataError(
                f"{name} is neither a file of {self.library.where} nor another file: name a video."
            )
        if time is None and len(rows) > 1:
            raise DataError(f"{name} has {len(rows)} clips: add a time in seconds, as in {name}@12.5.")
        if time is None:
            own = frozenset(row["id"] for row in rows)
            return (frames[0] if rows else self.outside(path)[0]), own
        if time >= (length := duration(path)):
            raise DataError(f"{name} ends at {length:g} s: name an earlier time than {time:g} s.")
        own = [row["id"] for row in rows if row["start"] <= time < (row["end"] or math.inf)]
        images, _ = read_clip(Clip("", path, (), "", time, time + 1e-3), 1, self.model.resolution)
        return encode(self.model, images[None])[0], frozenset(own)

    def clips_of(self, name: str) -> tuple[list[dict], Float[Tensor, "clips frames dim"] | None]:
        """The clips of a file of the library, whose name may be in either normal form of Unicode."""
        names = [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]  # macOS writes NFD
        known = (self.library.clips_of(name) for name in names)
        return next(((rows, frames) for rows, frames in known if rows), ([], None))

    def outside(self, path: Path) -> Float[Tensor, "1 frames dim"]:
        """phi_v of the frames of any video. Raises DataError."""
        clip = Clip(path.name, path, (), "")
        images, _ = read_clip(clip, self.model.arguments["num_frames"], self.model.resolution)
        return encode(self.model, images[None])

    # ---- captions

    def rank(self, captions: Sequence[str], clip: Float[Tensor, "1 frames dim"]) -> list[dict]:
        """Video-to-text: captions for one clip, [{"score", "caption"}], best first.

        The features of the captions are kept for the next clip."""
        score = self.score(self._captions(tuple(captions)), clip)[:, 0].tolist()
        answers = [{"score": s, "caption": caption} for s, caption in zip(score, captions)]
        return sorted(answers, key=lambda answer: -answer["score"])


def _ranked(rows: Sequence[dict], score: Sequence[float]) -> list[int]:
    """The numbers of clips, best first."""
    return sorted(range(len(rows)), key=lambda n: (-score[n], rows[n]["id"]))


def _span(row: dict) -> dict:
    return {"start": row["start"], "end": row["end"]}


def random_best(searcher: Searcher, captions: Sequence[str]) -> list[float]:
    """The score of the best clip of the library for each caption, in ascending order."""
    if len(searcher.library) <= EXACT:
        text, batches = searcher.text(captions), searcher.library.batches()
        best = torch.stack([searcher.score(text, frames).amax(dim=1) for _, frames in batches]).amax(dim=0)
        best = best.tolist()
    else:
        best = [max(searcher.candidates(build_query(caption))[2]) for caption in captions]
    return sorted(round(score, 4) for score in best)


def calibrate(library: Library, model: TMASS, trained: dict) -> None:
    """Stores in library.about["fit"] what says whether anything fits a query: the best scores that random
    captions reach in the library, its number of clips and M. Keeps it while the number changes little."""
    count, known = len(library), library.about.get("fit", {}).get("clips", 0)
    if count == 0 or abs(count - known) <= known / 10:
        return
    searcher = Searcher(SearchConfig(library.where), (library, model, trained))
    captions = read_captions(None, trained)
    best = random_best(searcher, random.Random(0).sample(captions, min(RANDOM, len(captions))))
    library.describe({**library.about, "fit": {"clips": count, "M": len(searcher.noise), "best": best}})


def _finite(values: Tensor, what: str) -> Tensor:
    if not values.isfinite().all():
        damage = "that are not finite numbers: its weights are damaged"
        raise ModelError(f"{what} {damage}; index again with another --checkpoint and --library.")
    return values


def check_identity(library: Library, model: TMASS, name: str) -> str:
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
