"""The model of a library and its answers: clips for a text, captions for a clip ("Inference Pipeline").

A query first finds a shortlist by vector search; the exact score of `evaluate.scores` ranks it. A small
library is scored in full.
"""

import functools
import inspect
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

import shapes
from data import center_crop, normalise
from engine.backbone import autocast, count_tokens, load_clip, tokenize, unknown_words
from engine.checkpoint import open_checkpoint
from engine.config import EvaluationConfig, prior_of
from engine.datasets import Clip, read_lines
from engine.distributed import choose_device
from engine.files import DataError, ModelError
from engine.frames import decode_frames
from engine.library import Hit, Library, filmstrip, identity
from engine.scoring import noise_bank, scores
from model import TMASS

SHORTLIST = 1000  # clips that are scored exactly; a library of at most twice as many is scored in full
LONGEST = 2000  # characters of a query, at most; the model reads 77 tokens
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
        check_identity(self.library, self.model, self.name)
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
