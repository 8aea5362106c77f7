"""The tiny CLIP, and how it was pretrained.

    python -m engine.tiny_clip --out FILE        # the command that made assets/tiny_clip.safetensors

`--arch tiny` loads the file, so nobody needs to run this. The tiny CLIP is of OpenAI's own class: a ResNet of
1.4 M parameters and a small text transformer. It learns in two stages, from examples that are drawn on the
fly and seen once:

    words      pictures of one scene, and a phrase for each value of an attribute ("a heart", "a red thing")
    captions   clips, one picture a scene, and their captions, of one scene or of two, besides the phrases

No validation or test clip is among them. (Step 0 of a stage has the random numbers of training clip 1 or 3.)
"""

import argparse
import math
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import shapes
from data import normalise
from engine.backbone import TINY, TINY_FILE, import_clip, laid_out, tokenize
from engine.files import write_atomic
from engine.frames import resize, segment_midpoints
from engine.metrics import relevance_metrics, retrieval_metrics
from engine.optim import learning_rate
from model import TMASS


@dataclass(frozen=True)
class Stage:
    """How one stage is trained, by AdamW with warm-up and cosine decay of its rate from `lr`."""

    name: str
    scenes: int  # of an example; one frame of each is drawn
    batch: int  # examples a step
    steps: int
    lr: float


class Batch(NamedTuple):
    """The examples of a step. Texts are phrases, one for each value, then captions, if there are any."""

    images: UInt8[Tensor, "videos frames 3 height width"]
    tokens: Int[Tensor, "texts tokens"]
    values: Int[Tensor, "videos frames attributes"]  # the number of each frame's value of each attribute
    fits: Bool[Tensor, "captions videos"]


STAGES = (Stage("words", 1, 32, 5000, 1e-3), Stage("captions", 3, 64, 3000, 1e-3))
GROUP = 16  # clips with the same palette
TEMPERATURE = 0.1  # of the attention over the frames of a clip, in `similarity`
PHRASES = {
    "colour": ("a {} thing", "a {} object", "a {} shape"), "shape": ("a {}",),
    "motion": ("a thing {}", "an object {}", "a shape {}"), "place": ("a thing {}", "{}, a thing"),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- the examples


def draw(scenes: list[shapes.Scene], rng: np.random.Generator) -> UInt8[np.ndarray, "frames height width 3"]:
    """One frame of each scene, at a random moment, in the size of phi_v."""
    frames = [np.asarray(shapes.draw_frame(scene, rng.random())) for scene in scenes]
    return np.stack([resize(frame, TINY["image_resolution"]) for frame in frames])


def phrases(rng: np.random.Generator) -> list[str]:
    """A phrase for every value of every attribute, with random synonyms."""
    words = [(name, known) for name, values in shapes.ATTRIBUTES.items() for known in values.values()]
    return [str(rng.choice(PHRASES[name])).format(rng.choice(known)) for name, known in words]


def random_palette(rng: np.random.Generator) -> dict[str, list[str]]:
    """One, two or all values of each attribute."""
    values = {name: list(known) for name, known in shapes.ATTRIBUTES.items()}
    return {name: rng.permutation(v)[: rng.choice([1, 2, len(v)])].tolist() for name, v in values.items()}


def make_batch(stage: Stage, rng: np.random.Generator) -> Batch:
    """Clips and phrases; for clips of several scenes captions, and which clip shows what which caption says.

    Clips with captions come in groups with a palette of their own. So those of a group differ in little, and
    only who understands the whole caption tells them apart."""
    values = {name: list(known) for name, known in shapes.ATTRIBUTES.items()}
    palette, clips, texts = values, [], []
    for number in range(stage.batch):
        if stage.scenes > 1 and number % GROUP == 0:
            palette = random_palette(rng)
        clips.append([shapes.random_scene(rng, palette) for _ in range(stage.scenes)])
        texts += [shapes.random_caption(clips[-1], rng)] if stage.scenes > 1 else []
    images = torch.from_numpy(np.stack([draw(scenes, rng) for scenes in clips])).permute(0, 1, 4, 2, 3)
    right = [[[v.index(getattr(scene, a)) for a, v in values.items()] for scene in clip] for clip in clips]
    fits = torch.from_numpy(shapes.fits([text.mentions for text in texts], clips))
    tokens = tokenize([*phrases(rng), *(text.text for text in texts)], TINY["context_length"])
    return Batch(images, tokens, torch.tensor(right), fits)


@dataclass(frozen=True)
class Examples(IterableDataset):
    """The batches of a stage. They depend on seed, stage and step alone."""

    stage: Stage
    seed: int

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.stage.steps):
            # make_clip's are [VERSION, seed, number, 0], with number >= 3000 for validation and test
            rng = np.random.default_rng([shapes.VERSION, self.seed, self.stage.scenes, step])
            yield make_batch(self.stage, rng)


# ------------------------------------------------------------------------------------------------ the losses


def similarity(
    text: Float[Tensor, "texts dim"], frames: Float[Tensor, "videos frames dim"]
) -> Float[Tensor, "texts videos"]:
    """cos(t, v). v weighs the frames f_i, scaled to length 1, by softmax(cos(t, f_i) / TEMPERATURE)."""
    text, frames = F.normalize(text, dim=-1), F.normalize(frames, dim=-1)
    weights = (torch.einsum("td,vfd->tvf", text, frames) / TEMPERATURE).softmax(dim=-1)
    video = torch.einsum("tvf,vfd->tvd", weights, frames)
    return torch.einsum("td,tvd->tv", text, F.normalize(video, dim=-1))


def words_loss(
    scores: Float[Tensor, "phrases pictures"], values: Int[Tensor, "pictures attributes"]
) -> Float[Tensor, ""]:
    """The cross-entropy of the right phrase among those of an attribute, summed over attributes."""
    parts = scores.T.split([len(known) for known in shapes.ATTRIBUTES.values()], dim=1)
    return sum(F.cross_entropy(part, right) for part, right in zip(parts, values.T, strict=True))


def captions_loss(
    scores: Float[Tensor, "captions videos"], fits: Bool[Tensor, "captions videos"]
) -> Float[Tensor, ""]:
    """CLIP's loss L_ce, with a target that is spread evenly over all that fits."""
    target = fits.float()
    rows = (scores.log_softmax(dim=1) * target / target.sum(dim=1, keepdim=True)).sum(dim=1)
    columns = (scores.log_softmax(dim=0) * target / target.sum(dim=0)).sum(dim=0)
    return -(rows.mean() + columns.mean()) / 2


def loss_of(model: TMASS, known: Int[Tensor, " tokens"], batch: Batch) -> Float[Tensor, ""]:
    """The words' loss on every picture, and the captions' loss on the clips if there are captions."""
    text = model.encode_text(torch.searchsorted(known, batch.tokens))
    frames = model.encode_frames(normalise(batch.images))
    phrases, captions = text.split([len(text) - len(batch.fits), len(batch.fits)])
    scale = model.logit_scale.exp()
    loss = words_loss(scale * similarity(phrases, frames.flatten(0, 1)[:, None]), batch.values.flatten(0, 1))
    if len(captions):
        loss = loss + captions_loss(scale * similarity(captions, frames), batch.fits)
    return loss


# ---------------------------------------------------------------------------------------------- the training


def known_tokens() -> Int[Tensor, " tokens"]:
    """The tokens of every word that captions and phrases can hold, with CLIP's marks; sorted."""
    texts = [word for values in shapes.ATTRIBUTES.values() for words in values.values() for word in words]
    texts += [joined.format(a="", b="") for joined in shapes.JOINED]
    texts += [phrase.format("") for phrases in PHRASES.values() for phrase in phrases]
    return tokenize(texts, TINY["context_length"]).unique()


def pretrain(out: Path, stages: Sequence[Stage] = STAGES, seed: int = 0, workers: int = 1) -> TMASS:
    """Trains the tiny CLIP, writes it to `out` now and then, and returns it (in TMASS, with mean pooling).

    Its token embedding has rows for `known_tokens` alone."""
    known, started = known_tokens(), time.time()
    torch.manual_seed(seed)
    clip = laid_out(import_clip().model.CLIP(**{**TINY, "vocab_size": len(known)}).float())
    model = TMASS(clip, "mean", "none", num_frames=1)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    about = dict(command="python -m engine.tiny_clip", seed=str(seed), machine=machine)
    for stage in stages:
        for step in train_stage(model, known, stage, seed, workers):
            found, minutes = validate(model, known), round((time.time() - started) / 60)
            print(f"{stage.name}, step {step}, {minutes} min, validation: {found}", flush=True)
            write(
                out,
                model,
                known,
                **about,
                steps=f"{stage.name} {step}",
                minutes=str(minutes),
                validation=str(found),
            )
    return model.eval()


def train_stage(model: TMASS, known: Tensor, stage: Stage, seed: int, workers: int) -> Iterator[int]:
    """Trains all of the model on one stage. Yields the step now and then, and at the end."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=0.05), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.98))
    loader = DataLoader(Examples(stage, seed), batch_size=None, num_workers=workers)
    for step, batch in enumerate(loader, start=1):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * learning_rate(step - 1, stage.steps, 0.1)
        loss = loss_of(model, known, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 100 == 0:
            print(f"{stage.name}, step {step} of {stage.steps}, loss {loss.item():.2f}", flush=True)
        if step % 1000 == 0 or step == stage.steps:
            yield step


@torch.no_grad()
def validate(model: TMASS, known: Tensor, clips: range | None = None) -> dict[str, float]:
    """Metrics of `similarity` on the validation clips: 12 frames each, as drawn, without video compression.

    "one scene" and "two scenes": fits@1 of captions that mention so many."""
    model.eval()
    made = [shapes.make_clip(0, number) for number in clips or shapes.numbers("val")]
    texts = [caption for clip in made for caption in clip.captions]
    frames = []
    for clip in made:
        drawn = list(shapes.draw_clip(clip))
        picked = [np.asarray(drawn[number]) for number in segment_midpoints(shapes.FRAMES, 12)]
        images = np.stack([resize(frame, TINY["image_resolution"]) for frame in picked])[None]
        frames.append(model.encode_frames(normalise(torch.from_numpy(images).permute(0, 1, 4, 2, 3))))
    tokens = tokenize([text.text for text in texts], TINY["context_length"])
    text = torch.cat([model.encode_text(part) for part in torch.searchsorted(known, tokens).split(500)])
    scores = torch.cat([similarity(part, torch.cat(frames)) for part in text.split(250)])
    fits = torch.from_numpy(shapes.fits([text.mentions for text in texts], [clip.scenes for clip in made]))
    t2v = retrieval_metrics(scores, torch.arange(len(made)).repeat_interleave(shapes.CAPTIONS))["t2v"]
    found = {name: t2v[name] for name in ("R@1", "R@10")}
    found |= relevance_metrics(scores, fits)
    for name, count in (("one scene", 1), ("two scenes", 2)):
        own = torch.tensor([len(text.mentions) == count for text in texts])
        found[name] = relevance_metrics(scores[own], fits[own])["fits@1"]
    return {name: round(value, 1) for name, value in found.items()}


def write(path: Path, model: TMASS, known: Tensor, **about: str) -> None:
    """Writes the CLIP as safetensors: float16, and rows of the token embedding for the known tokens only."""
    state = {name: value.half().contiguous() for name, value in model.clip.state_dict().items()}
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    write_atomic(path, save({**state, "token_embedding.rows": known.int()}, about))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Pretrain the tiny CLIP (about an hour on one core).")
    parser.add_argument("--out", type=Path, default=TINY_FILE, help="the file to write")
    parser.add_argument("--seed", type=int, default=0, help="of weights and examples")
    args = parser.parse_args(arguments)
    pretrain(args.out, seed=args.seed)


if __name__ == "__main__":
    main()
