"""Training of T-MASS ("Implementation Details"): config, the loop, schedule, checkpoints.

    python train.py                                        # T-MASS on the built-in clips, on a CPU, in minutes
    python train.py --method xpool                         # its baseline; --method clip: mean-pooled frames
    python train.py --dataset csv --annotations captions.csv --videos clips --arch ViT-B/16
    torchrun --nproc-per-node 4 train.py ...               # one process a GPU: the same batch, split over them

The step is `train_step`, and what follows the encoders `head_loss`, in the paper's order. The number of a step seeds all its randomness, and
its batch follows from seed and epoch: so a run that is resumed ends with the weights of one that was never stopped. The loss is always that of
the whole batch, whether it is encoded at once, by micro-batches (--micro-batch) or by several processes (torchrun).
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

import data
from data import Clip, ClipDataset, DataError, FrameCache
from evaluate import (
    Expectation,
    autocast,
    check_numbers,
    choose_device,
    extract_features,
    feature_cache,
    gather,
    join_processes,
    noise_bank,
    open_checkpoint,
    rank_and_world,
    resolve_amp,
    retrieval_metrics,
    scores,
    share,
)
from losses import cosine_scores, symmetric_cross_entropy, tmass_loss
from model import TMASS, ModelError, load_clip, load_file, matched, save_checkpoint, stochastic_text, support_text


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Defaults are the paper's; a data set's preset comes before them, and a flag before both."""

    dataset: Literal["shapes", "csv", "msrvtt", "msrvtt-7k", "msrvtt-full", "lsmdc", "didemo", "charades", "vatex", "msvd", "pictures"] = "shapes"
    """which clips and captions; shapes is built in and trains on a CPU in minutes (pictures: what the tiny CLIP is pretrained on)"""
    annotations: Path | None = None
    """for csv: a file of video,caption[,split]; for the others: the folder of annotations, where it is not DATA/DATASET"""
    videos: Path | None = None
    """the folder of video files; for csv needed, for the others where it is not DATA/DATASET"""
    data: Path = Path("data")
    """folder of data sets and of the cache of decoded frames"""
    out: Path | None = None
    """folder of this run; default: runs/DATASET-ARCH-METHOD, with a number behind it when that is taken"""
    resume: bool = False
    """go on from the last checkpoint in --out (or start, if there is none)"""

    method: Literal["clip", "xpool", "tmass"] = "tmass"
    """clip: mean-pooled frames; xpool: text-conditioned fusion psi; tmass: psi and the text mass"""
    recipe: Literal["paper", "best"] = "paper"
    """how T-MASS trains, a preset of the flags below: paper, as the paper reads; best, R of t and v trained for ranking (RESULTS.md), the
    default for the built-in clips"""
    arch: str = "ViT-B/32"
    """tiny, ViT-B/32, ViT-B/16, or a file of CLIP weights"""
    weights: Path | None = None
    """CLIP's weights as a file, for machines without network"""
    freeze: Literal["none", "vision", "clip"] = "none"
    """vision: phi_v keeps its weights, and its features are computed once and kept: training psi, R and phi_t then costs a tenth; clip: phi_t
    keeps its weights too, and psi, R and the temperature alone learn"""
    num_frames: int = 12
    """T', frames a clip"""
    sampling: Literal["uniform", "random"] = "uniform"
    """of frames in training: the midpoints of T' segments, or a random one of five in each segment; validation and test take midpoints"""
    heads: int = 1
    """attention heads of psi"""
    dropout: float = 0.3
    """in psi"""
    radius: Literal["fixed", "scalar", "linear", "joint"] = "linear"
    """R = exp(mean S), exp(theta mean S) or exp(S W + b), the paper's; joint: R from t and v too, not the paper's (model.Radius)"""
    initial_radius: float = 1.0
    """about the R that training starts from, exp(b)"""
    prior: Literal["normal", "uniform"] = "normal"
    """eps ~ N(0, prior_std^2), the paper's with 1; or U(0, 1), the released code's default"""
    prior_std: float = 1.0
    pairs: Literal["matched", "every", "expected"] = "matched"
    """L_s in training: t_s drawn for matched pairs only (as the released code), for every pair (as inference does), or no draw: every pair
    scored by the expected best of M, as --score expected does in inference, so that R is rewarded for ranking"""
    alpha: float = 1.2
    """weight of the support-text loss"""
    ce: float = 0.0
    """weight of L_ce, the loss of t itself, beside L_s (the paper's ablation keeps it in one row)"""
    M: int = 20
    """texts drawn for each pair in validation, and with --pairs expected the M of its expected best"""

    epochs: int = 5
    """an epoch shows every caption once"""
    max_steps: int | None = None
    """end after so many steps (the schedule too)"""
    batch: int = 32
    """text-video pairs a step"""
    clip_lr: float = 1e-6
    """AdamW's learning rate for CLIP"""
    head_lr: float = 3e-5
    """and for psi and R"""
    radius_lr: float | None = None
    """and for R alone, where it is another than psi's: at psi's, W hardly leaves its random start"""
    weight_decay: float = 0.2
    """on all parameters, biases, norms and scalars too, as the released code"""
    warmup: float = 0.1
    """part of the steps in which the rate rises; then it falls as a cosine"""
    grad_clip: float = 1.0
    """largest norm of the gradient"""
    augment: bool = True
    """random crops and flips, the same for all frames of a clip"""
    seed: int = 0
    """of initialisation, order, augmentation, dropout and noise"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """autocast of CLIP, over float32 weights; psi, R, scores and losses stay in float32. auto: bf16 on CUDA, off on the CPU"""
    micro_batch: int | None = None
    """pairs that each process encodes at a time, with the memory of so many; exact, for a second forward pass of CLIP"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of CLIP's two transformers; auto: on CUDA"""
    workers: int = 0
    """processes that load batches ahead"""
    save_every: int = 0
    """steps between checkpoints, besides the one at each epoch's end"""


# The smallest and largest values of numbers; others have none.
RANGES: dict[str, tuple[int | float, float]] = {
    **dict.fromkeys(("num_frames", "heads", "epochs", "max_steps", "batch", "micro_batch"), (1, math.inf)),
    **dict.fromkeys(("prior_std", "alpha", "ce", "M", "clip_lr", "head_lr", "radius_lr", "weight_decay"), (0, math.inf)),
    **dict.fromkeys(("seed", "workers", "save_every"), (0, math.inf)),
    **dict.fromkeys(("initial_radius", "grad_clip"), (1e-6, math.inf)),
    **dict.fromkeys(("dropout", "warmup"), (0, 1)),
}

# A data set's numbers where they differ from the defaults. The released code's commands: head_lr 3e-5 for MSR-VTT, 1e-5 for LSMDC; numbers
# that a data set has of its own and that we do not know for certain are left at the defaults.
SMALL = dict(arch="tiny", weight_decay=0.01, augment=False)
PRESETS: dict[str, dict] = {
    "shapes": dict(**SMALL, recipe="best", freeze="vision", batch=64, clip_lr=3e-4, head_lr=5e-4, epochs=3),
    "pictures": dict(**SMALL, method="clip", num_frames=1, batch=128, clip_lr=1e-3, epochs=2),
    "lsmdc": dict(head_lr=1e-5, workers=8),
    **{name: dict(workers=8) for name in ("msrvtt", "msrvtt-7k", "msrvtt-full", "didemo", "charades", "vatex", "msvd")},
}
# "best": R sees t and v, and every pair's training score is the expected best of M draws, so that R learns to rank; t keeps a loss of its own.
# Chosen on validation of the built-in clips; what else was tried: RESULTS.md.
RECIPES: dict[str, dict] = {"paper": {}, "best": dict(radius="joint", pairs="expected", alpha=0.0, ce=0.5, radius_lr=1e-3)}
# Mean pooling on the built-in clips is the second half of the tiny CLIP's own pretraining: all of it learns.
PRETRAINING = dict(freeze="none", batch=32, clip_lr=1e-3, epochs=1, max_steps=200)


def preset(dataset: str, method: str, recipe: str | None = None) -> Config:
    """The defaults for a data set, a method and a recipe, before any flag."""
    own = {"method": method, **PRESETS.get(dataset, {}), **(PRETRAINING if (dataset, method) == ("shapes", "clip") else {})}
    default = own.get("recipe", "paper") if method == "tmass" else "paper"  # other methods know no recipe
    own["recipe"] = recipe or default
    return replace(Config(), dataset=dataset, **own, **(RECIPES[own["recipe"]] if method == "tmass" else {}))


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The command line: the preset of --dataset and --method, then what the flags say."""
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="shapes")
    first.add_argument("--method", default="tmass")
    first.add_argument("--recipe", choices=RECIPES)
    chosen, _ = first.parse_known_args(arguments)
    default = preset(chosen.dataset, chosen.method, chosen.recipe)
    return tyro.cli(Config, default=default, args=arguments, description=__doc__)


# -------------------------------------------------------------------------------------------------------------- what a run starts from


def build(config: Config) -> TMASS:
    """The model as training starts: CLIP with its pretrained weights, psi and R with their first values."""
    tiny = config.arch == "tiny" and config.weights is None and config.dataset != "pictures"
    pretrained = tiny_clip(config) if tiny else None
    torch.manual_seed(config.seed)  # after the tiny CLIP's pretraining: what follows is the same whether it had to be made or not
    clip = open_checkpoint(pretrained)[0].clip if pretrained else load_clip(config.arch, config.weights)
    return TMASS(clip, config.method, config.num_frames, config.radius, config.heads, config.dropout, config.initial_radius)


def tiny_clip(config: Config) -> Path:
    """The run that the tiny CLIP of a run starts from; it is made now (once, in about three minutes) if it is not there yet.

    "tiny" has no weights on the web, so it is pretrained as OpenAI's CLIP was: on still pictures with captions, then (mean-pooled, the
    method "clip") on whole clips. From then on it is used as "ViT-B/32" is."""
    stage = ("pictures" if (config.dataset, config.method, config.freeze) == ("shapes", "clip", "none") else "shapes", "clip")
    pretraining = replace(preset(*stage), data=config.data, device=config.device)
    out = run_folder(pretraining)
    if not finished(out):
        if rank_and_world()[1] > 1:
            raise ModelError(f"the tiny CLIP is not there yet ({out}): pretrain it first, by one process: python train.py --method clip.")
        print(f"The tiny CLIP is pretrained first, once, on the built-in {stage[0]} ({out}).", flush=True)
        try:
            train(replace(pretraining, out=out, resume=True))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped while the tiny CLIP is pretrained: the same command goes on from here") from None
    return out


def read_data(config: Config) -> tuple[list[Clip], list[Clip]]:
    """Training and validation clips. The test split is read by evaluate.py alone."""
    clips = data.read_clips(config.dataset, config.data, config.annotations, config.videos)
    return data.of_split(clips, "train"), data.of_split(clips, "val")


def without(clips: list[Clip], unreadable: dict[str, str]) -> list[Clip]:
    """The clips whose frames can be had. Raises DataError when none is left."""
    left = [clip for clip in clips if clip.id not in unreadable]
    if not left:
        raise DataError(f"none of the {len(clips)} {clips[0].split} clips can be read: {unreadable[clips[0].id]}")
    return left


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises ModelError where a file or folder of a run cannot be written."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"{path} could not be written ({error.strerror}): make room there and go on by --resume, or name another --out.") from None


def record_data(out: Path, clips: list[Clip], val_clips: list[Clip], unreadable: dict[str, str]) -> None:
    """data.json: the clips of this run's validation, and those that were skipped, each with the reason; says how many these are."""
    content = dict(train=len(clips), val=[clip.id for clip in val_clips], skipped=unreadable)
    with writing(out / "data.json"):
        (out / "data.json").write_text(json.dumps(content, indent=1) + "\n")
    if unreadable:
        print(
            f"{len(unreadable)} clips cannot be read and are skipped, listed in {out}/data.json; the first: {next(iter(unreadable.values()))}",
            flush=True,
        )


def run_folder(config: Config) -> Path:
    """runs/DATASET-ARCH-METHOD, where a run goes that names no folder."""
    arch = Path(config.arch).stem if Path(config.arch).is_file() else config.arch
    return Path("runs") / re.sub(r"[^a-z0-9-]+", "", f"{config.dataset}-{arch}-{config.method}".lower())


def open_run(config: Config) -> Path:
    """The folder to write to: --out, or a new one under runs/. A run that is there is gone on with only by --resume, never overwritten."""
    out = config.out or run_folder(config)
    if (out / "metrics.jsonl").exists() and not config.resume:
        if config.out:
            raise ModelError(f"{out} holds a run: add --resume to go on with it, or name another folder by --out.")
        number = 2
        while (out.parent / f"{out.name}-{number}").exists():
            number += 1
        out = out.parent / f"{out.name}-{number}"
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return out


def finished(out: Path) -> bool:
    """Whether the run in a folder has come to its end."""
    return (out / "metrics.jsonl").is_file() and '"done"' in (out / "metrics.jsonl").read_text()


# Flags that may differ between a run and its resumption: they change its numbers by rounding, if at all.
FREE = {"out", "resume", "device", "workers", "data", "annotations", "videos", "save_every", "amp", "micro_batch", "compile"}


def plain(config: Config) -> dict:
    """The config as strings and numbers, for checkpoints and results."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def load_state(path: Path, config: Config, fingerprint: str) -> dict:
    """What last.pt holds. Raises ModelError when it was made by another config or from other data."""
    state = load_file(path)
    if "optimizer" not in state or "config" not in state:
        raise ModelError(f"{path} is not a last.pt of train.py: nothing to resume from; name another --out.")
    before = {**plain(preset(config.dataset, config.method, "paper")), **state["config"]}  # a flag that is newer than the run had its default
    changed = [f"{name} {before[name]} -> {value}" for name, value in plain(config).items() if name not in FREE and before[name] != value]
    if changed:
        if before["recipe"] != config.recipe:
            changed = [f"--recipe {before['recipe']}, not {config.recipe}"]
        raise ModelError(f"{path} was made with another config ({', '.join(changed)}): resume with the same flags, or name another --out.")
    if state["data"] != fingerprint:
        raise ModelError(f"{path} was trained on other clips or captions than these: resume with the same data, or name another --out.")
    return state


# ------------------------------------------------------------------------------------------------------------------------ training


def learning_rate(step: int, total: int, warmup: float) -> float:
    """The factor of the learning rate at a step: a line up over the first `warmup` part of the steps, then half a cosine down to 0."""
    rise = max(1, round(warmup * total))
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def draw_noise(radius: Float[Tensor, "texts videos dim"], prior: str, std: float) -> Float[Tensor, "1 texts videos dim"]:
    """eps for one text of each mass: N(0, std^2), the paper's with 1, or U(0, 1), the released code's default."""
    noise = torch.empty(1, *radius.shape, device=radius.device)
    return noise.uniform_() if prior == "uniform" else noise.normal_(std=std)


def train_mode(model: TMASS, config: Config) -> None:
    """Training mode, but for batch norm (the tiny CLIP's ResNet has it): only CLIP's own pretraining moves its statistics."""
    model.train()
    if config.method != "clip":
        for module in model.clip.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


class State:
    """What a step changes, and what last.pt holds: the model, AdamW, its schedule, the scale of fp16's loss, the guard's counts."""

    def __init__(self, model: TMASS, config: Config, total: int):
        device = model.logit_scale.device
        clip_parameters = [p for p in model.clip.parameters() if p.requires_grad]
        radius_parameters = model.radius.parameters() if model.radius else ()
        rates = (config.clip_lr, config.head_lr, config.head_lr if config.radius_lr is None else config.radius_lr)
        groups = [{"params": [*own], "lr": lr} for own, lr in zip((clip_parameters, model.fusion.parameters(), radius_parameters), rates)]
        self.model, self.step, self.validated, self.best, self.val = model, 0, 0, -1.0, None  # val: metrics of the last validation
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: learning_rate(step, total, config.warmup))
        self.scaler = torch.amp.GradScaler(device.type, enabled=resolve_amp(device, config.amp) == "fp16")
        self.guard = Guard(model, config)
        self.averaging = Averaging(model)

    def state_dict(self) -> dict:
        """All of it but the model, as plain values and tensors."""
        return dict(optimizer=self.optimizer.state_dict(), schedule=self.schedule.state_dict(), scaler=self.scaler.state_dict(),
                    guard=self.guard.counts.tolist(), step=self.step, validated=self.validated, best=self.best, val=self.val)  # fmt: skip

    def load(self, state: dict) -> None:
        """Goes back to what last.pt holds, the model included. Raises ModelError where it does not fit."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.guard.counts = self.guard.counts.new_tensor(state["guard"])
            self.step, self.validated, self.best, self.val = state["step"], state["validated"], state["best"], state["val"]
        except (KeyError, RuntimeError, ValueError) as error:
            what = str(error).strip().splitlines()[0]
            raise ModelError(f"last.pt does not fit this model ({what}): another version wrote it, or --arch names other weights now; name another "
                             "--out.") from None  # fmt: skip


class Guard:
    """Skips each step whose loss or gradient is not finite, and counts such steps, without making a GPU wait.

    A skipped step leaves weights, batch norm's statistics and AdamW's state as they were; the schedule and the batches go on. (With fp16 the
    loss's scale is halved: a few skipped steps at the start are how the scale is found.) AdamW's fused form skips on the device, where its
    found_inf says so. The counts are read when a row is logged: `stop_after` in a row end the training."""

    stop_after = 10

    def __init__(self, model: TMASS, config: Config):
        norms = [module for module in model.clip.modules() if isinstance(module, nn.BatchNorm2d)] if config.method == "clip" else []
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self.counts = torch.zeros(4, dtype=torch.long, device=model.logit_scale.device)  # skipped; in a row now; longest row, and its last step

    def before(self) -> None:
        """Remembers the statistics that the step's forward pass will move."""
        self.remembered = [buffer.clone() for buffer in self.statistics]

    def look(self, optimizer: torch.optim.Optimizer, norm: Float[Tensor, ""], step: int) -> None:
        """Has the optimizer skip the step, where the gradient's norm is not finite (so does GradScaler, by itself)."""
        bad = ~norm.isfinite()
        optimizer.found_inf = bad.float()
        for buffer, old in zip(self.statistics, self.remembered):
            buffer.copy_(torch.where(bad, old, buffer))
        skipped, row, longest, last = self.counts.unbind()
        row = (row + 1) * bad
        self.counts = torch.stack([skipped + bad, row, torch.maximum(longest, row), torch.where(row > longest, step, last)])

    def read(self) -> tuple[int, int | None]:
        """(steps skipped so far, the last of `stop_after` or more skipped in a row or None)."""
        skipped, _, longest, last = self.counts.tolist()
        return skipped, last if longest >= self.stop_after else None


# ------------------------------------------------------------------------------------------------------------------------ the step


def encode(
    model: TMASS, images: Tensor, tokens: Int[Tensor, "n tokens"], config: Config
) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n frames dim"]]:
    """t = phi_t(caption) and f = phi_v(frame) of this process's pairs, in autocast; float32.

    With --micro-batch only the features are kept of each micro-batch; its activations are computed again when the gradient of the loss, which
    has seen the features of the whole batch, comes back to it. So gradients are those of one batch, and memory is that of a micro-batch
    (gradient caching). With --freeze vision, images are the features already, and with --freeze clip the tokens are t."""

    def part(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(tokens.device, config.amp):
            text = tokens if config.freeze == "clip" else model.encode_text(tokens)
            return text, model.encode_frames(data.normalise(images)) if config.freeze == "none" else images

    if config.micro_batch is None or config.micro_batch >= len(tokens):
        return part(images, tokens)
    micro_batches = zip(images.split(config.micro_batch), tokens.split(config.micro_batch))
    parts = [checkpoint(part, *micro_batch, use_reentrant=False, preserve_rng_state=False) for micro_batch in micro_batches]
    text, frames = (torch.cat(features) for features in zip(*parts))
    return text, frames


def head_loss(
    model: TMASS, text: Float[Tensor, "n dim"], frames: Float[Tensor, "n frames dim"], config: Config
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """From the features of a whole batch, in which text i belongs to video i, to the loss and its parts, in the paper's order; float32."""
    video = model.fusion(text, frames)  # v = psi(t, f)
    scale = model.logit_scale.exp()
    if config.method != "tmass":
        loss = symmetric_cross_entropy(cosine_scores(text, video), scale)  # L_ce
        return loss, {"L_ce": loss}
    radius = model.radius(text, frames, video)  # R, exp(S W + b) in the paper
    t_sup = support_text(text, matched(video), matched(radius))
    if config.pairs == "expected":
        best = Expectation(config.M, config.prior, config.prior_std).of(text[:, None], radius, video)  # E max_m cos(t_s, v), as inference scores
        parts = {"L_s": symmetric_cross_entropy(best, scale), "L_sup": symmetric_cross_entropy(cosine_scores(t_sup, video), scale)}
        loss = parts["L_s"] + config.alpha * parts["L_sup"]
    else:
        mass = matched(radius)[:, None] if config.pairs == "matched" else radius  # (texts, 1 or videos, dim)
        noise = draw_noise(mass, config.prior, config.prior_std)  # eps
        t_s = stochastic_text(text, mass, noise)[0].squeeze(1)  # t_s = t + R eps
        loss, parts = tmass_loss(t_s, t_sup, video, scale, config.alpha)  # L_s + alpha L_sup
    if config.ce:
        parts["L_ce"] = symmetric_cross_entropy(cosine_scores(text, video), scale)
        loss = loss + config.ce * parts["L_ce"]
    return loss, parts


def train_step(state: State, images: Tensor, tokens: Int[Tensor, "n tokens"], config: Config, pairs: int) -> tuple[Tensor, dict[str, Tensor]]:
    """One step, on this process's share of a batch of `pairs`. Returns the loss and its parts, on the device: nothing here waits for a GPU.

    Every process computes the loss of the whole batch, from the same features and, as the step's number seeds it, the same noise."""
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    torch.manual_seed(config.seed * 1_000_003 + state.step)  # dropout's and eps's: a step's number is all of its luck
    state.guard.before()
    text, frames = encode(model, images, tokens, config)  # t, f
    text, frames = gather_features(text, pairs), gather_features(frames, pairs)  # of all processes
    loss, parts = head_loss(model, text, frames, config)  # L
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward(torch.where(loss.isfinite(), 1.0, torch.nan))  # a loss that is not finite gives no gradient that is
    state.averaging.wait()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    state.guard.look(optimizer, norm, state.step)
    scaler.step(optimizer)
    scaler.update()
    state.schedule.step()
    with torch.no_grad():
        model.logit_scale.clamp_(max=math.log(100))  # CLIP's own bound on the temperature
    state.step += 1
    return loss.detach(), {name: part.detach() for name, part in parts.items()}


# --------------------------------------------------------------------------------------------------------------- several processes


class _Gather(torch.autograd.Function):
    """Rows of all processes. Each has the loss of all rows, so the gradient of a process's own rows is complete there; times their number,
    because gradients of weights are averaged over processes (Averaging), which leaves the heads' as they are and sums CLIP's."""

    @staticmethod
    def forward(ctx, own: Tensor, rows: slice, total: int) -> Tensor:
        ctx.rows = rows
        every = own.new_zeros(total, *own.shape[1:])
        every[rows] = own
        dist.all_reduce(every)
        return every

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.rows] * dist.get_world_size(), None, None


def gather_features(own: Float[Tensor, " n *rest"], total: int) -> Float[Tensor, " total *rest"]:
    """The features of the whole batch, of which this process has its share; gradients go back to each process's own."""
    return _Gather.apply(own, share(total), total) if dist.is_initialized() else own


class Averaging:
    """The mean of each gradient over the processes, under way as soon as backward has made it, while it makes the next."""

    def __init__(self, model: TMASS):
        self.under_way: list[dist.Work] = []
        for parameter in model.parameters() if dist.is_initialized() else ():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._start)

    def _start(self, parameter: Tensor) -> None:
        self.under_way.append(dist.all_reduce(parameter.grad.div_(dist.get_world_size()), async_op=True))

    def wait(self) -> None:
        """Returns when all of them are there (on CUDA: when all are queued before what follows)."""
        while self.under_way:
            self.under_way.pop().wait()


@contextlib.contextmanager
def one_before_the_others() -> Iterator[None]:
    """Under torchrun, one process of each machine runs a block before the others: what it downloads, renders or decodes is then there for them."""
    first = not dist.is_initialized() or os.environ["LOCAL_RANK"] == "0"
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:
            barrier()


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        dist.barrier()


T = TypeVar("T")


def from_first(function: Callable[[], T]) -> T:
    """What a function returns or raises in the first process, in all of them."""
    if not dist.is_initialized():
        return function()
    box: list = [None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except (DataError, ModelError) as error:
            box[0] = error
    dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set in any process."""
    if dist.is_initialized():
        flags = torch.tensor(flag, dtype=torch.int32, device=device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        flag = bool(flags)
    return flag


# ------------------------------------------------------------------------------------------------------------------------ training


LOG_EVERY = 10  # steps between rows of metrics.jsonl: only there does the CPU wait for a GPU


def validate(model: TMASS, clips: list[Clip], cache: FrameCache, config: Config) -> dict[str, dict[str, float]]:
    """Metrics on the validation split, exactly as evaluate.py makes them; every process encodes and scores its share of the videos."""
    own = share(len(clips))
    store = feature_cache(cache, model) if config.freeze != "none" else None
    features = extract_features(model, clips[own], cache, config.batch, config.workers, config.amp, store, keep=store is not None)
    text, owner = gather(features.text), gather(features.owner + own.start)
    noise = noise_bank(config.M, text.shape[1], config.seed, config.prior, config.prior_std)
    matrix = gather(scores(model.eval(), text, features.frames, noise).T.contiguous()).T
    return retrieval_metrics(matrix, owner)


def check(config: Config, model: TMASS, batches: list[list[tuple[int, int]]], val_clips: list[Clip]) -> None:
    """Raises ModelError for what cannot be trained as asked."""
    world, batch_norm = rank_and_world()[1], any(isinstance(module, nn.BatchNorm2d) for module in model.clip.modules())
    if config.method == "clip" and batch_norm and (world > 1 or config.micro_batch):
        raise ModelError("--method clip trains the batch norm of this CLIP, whose statistics are the whole batch's: leave --micro-batch away, and "
                         "start one process.")  # fmt: skip
    if config.method == config.freeze == "clip":
        raise ModelError("--freeze clip leaves nothing of --method clip to learn: use --freeze vision or none.")
    if world > min(len(val_clips), *map(len, batches)):
        raise ModelError(f"{world} processes are more than the pairs of a batch or the validation clips: start fewer.")


def compile_encoders(model: TMASS, choice: str) -> None:
    """--compile: CLIP's two transformers (or its ResNet) become compiled when they first run; names in checkpoints stay."""
    if choice == "on" or (choice == "auto" and model.logit_scale.is_cuda and importlib.util.find_spec("triton")):
        model.clip.visual.compile()
        model.clip.transformer.compile()


def train(config: Config) -> Path:
    """Trains as the config says. Returns the run's folder: last.pt, best.pt (by R@1 + R@5 + R@10 on validation), metrics.jsonl, loss.png.

    Ctrl-C or SIGTERM ends the step (with several processes: at most ten), saves, and stops. Under torchrun every process calls this, and the
    first one writes. Raises DataError and ModelError, each with a sentence for the user."""
    device, (rank, world) = choose_device(config.device), rank_and_world()
    check_numbers(config, RANGES)
    if config.freeze != "none" and (config.augment or config.sampling == "random"):
        raise ModelError(f"--freeze {config.freeze} computes the features of each clip once: add --no-augment, and leave --sampling uniform.")
    if config.method == "tmass" and config.pairs == "expected" and config.M < 1:
        raise ModelError("--M 0 leaves --pairs expected no draw to expect anything of: give 1 or more, or --pairs matched.")
    with one_before_the_others():
        clips, val_clips = read_data(config)  # before weights are downloaded or made
        model = build(config).to(device)
        folder = data.cache_folder(config.dataset, config.data, config.videos)
        cache = FrameCache(folder, config.num_frames, model.resolution, data.CHOICES[config.sampling])
        store = feature_cache(cache, model) if config.freeze != "none" else None
        unreadable = cache.fill([clip for clip in [*clips, *val_clips] if not (store and store.load(clip) is not None)])
        clips, val_clips = without(clips, unreadable), without(val_clips, unreadable)
    dataset = ClipDataset(clips, cache, model.clip.context_length)
    batches_of = functools.partial(data.epoch_batches, clips, config.batch, config.seed)
    batches = batches_of(0)
    check(config, model, batches, val_clips)
    if device.type == "cuda":
        model.clip.visual.to(memory_format=torch.channels_last)
    compile_encoders(model, config.compile)
    if config.freeze != "none":
        (model.clip if config.freeze == "clip" else model.clip.visual).requires_grad_(False)
        model.logit_scale.requires_grad_(True)
        own = share(len(clips))
        features = extract_features(model, clips[own], cache, config.batch, config.workers, store=store, keep=True)
        dataset.features = gather(features.frames).cpu()
        if config.freeze == "clip":  # in the place of tokens, their features
            dataset.tokens = gather(features.text).cpu().split([len(clip.captions) for clip in clips])

    per_epoch = len(batches)
    total = min(config.epochs * per_epoch, config.max_steps or math.inf)
    state = State(model, config, total)
    out = from_first(lambda: open_run(config))
    fingerprint = hashlib.sha256(repr([(clip.id, clip.captions) for clip in [*clips, *val_clips]]).encode()).hexdigest()
    if config.resume and from_first(lambda: (out / "last.pt").exists()):
        state.load(load_state(out / "last.pt", config, fingerprint))
    log = Log(out, state.step, state.validated) if rank == 0 else None
    about = dict(config=plain(config), data=fingerprint, commit=git_commit())
    if rank == 0:
        record_data(out, clips, val_clips, unreadable)

    def save(name: str, **more) -> None:
        if rank == 0:
            save_checkpoint(out / name, model, **about, **more)

    if rank == 0:
        machine = f"{device}" if world == 1 else f"{world} processes on {device.type}"
        what = f"{len(clips)} clips to train on, {len(val_clips)} to validate, {total} steps of {len(batches[0])} pairs"
        print(f"{config.method} on {config.dataset}: {what} on {machine}, run {out}", flush=True)
    bar = tqdm(initial=state.step, total=total, desc=config.method, unit=" steps", disable=rank > 0)
    with Interrupt() as interrupt:
        while True:
            step = state.step
            if step > state.validated and (step % per_epoch == 0 or step == total):
                save("last.pt", **state.state_dict())  # whatever ends the validation ends no more than it
                state.val, state.validated = validate(model, val_clips, cache, config), step
                if rank == 0:
                    log.row(step=step, val=state.val)
                    found = "  ".join(f"{name} {value:.1f}" for name, value in state.val["t2v"].items())
                    bar.write(f"step {step}, validation: {found}", file=sys.stdout)
                if (score := sum(state.val["t2v"][name] for name in ("R@1", "R@5", "R@10"))) > state.best:
                    state.best = score
                    save("best.pt", step=step, val=state.val)
                save("last.pt", **state.state_dict())
            if step == total:
                break
            train_mode(model, config)
            epoch, done = divmod(step, per_epoch)
            dataset.augmentation = (config.seed, epoch) if config.augment else None
            dataset.sampling = (config.seed, epoch) if config.sampling == "random" else None
            batches = batches_of(epoch)[done : done + total - step]
            loader = data.batches(dataset, [batch[share(len(batch))] for batch in batches], config.workers, pin_memory=device.type == "cuda")
            for batch, (images, tokens) in zip(batches, loader):
                images, tokens = images.to(device, non_blocking=True), tokens.to(device, non_blocking=True)
                loss, parts = train_step(state, images, tokens, config, len(batch))
                step = state.step
                bar.update()
                logged = step % LOG_EVERY == 0 or step == total
                if logged:
                    skipped, last = state.guard.read()
                    numbers = {name: finite(value) for name, value in {"loss": loss, **parts, "scale": model.logit_scale.exp()}.items()}
                    if rank == 0:
                        bar.set_postfix({"loss": numbers["loss"]}, refresh=False)
                        log.row(step=step, **numbers, lr=state.schedule.get_last_lr(), skipped=skipped)
                    if last is not None:
                        ids = ", ".join(clips[clip].id for clip, _ in batches_of(last // per_epoch)[last % per_epoch])
                        raise ModelError(f"{state.guard.stop_after} steps in a row had a loss or gradient that is not finite, the last of them step "
                                         f"{last + 1}, with the clips {ids}: look at these, or lower --head-lr or --clip-lr; the weights in {out} "
                                         "are from before.")  # fmt: skip
                stop = (world == 1 or logged) and any_process(interrupt.asked, device)  # to ask the others makes a GPU wait
                if stop or (config.save_every and step % config.save_every == 0):
                    save("last.pt", **state.state_dict())
                if stop:
                    barrier()  # the first has saved
                    raise KeyboardInterrupt(f"stopped after step {step} of {total}: go on with the same command and --out {out} --resume")
    bar.close()
    if rank == 0:
        if not finished(out):
            log.row(step=state.step, done=True)
        with writing(out / "loss.png"):
            plot_losses(out)
    barrier()  # the files are there for all
    return out


def finite(value: Tensor) -> float | None:
    """A number for JSON, which knows no NaN."""
    number = value.item()
    return number if math.isfinite(number) else None


# --------------------------------------------------------------------------------------------------------------------------- records


class Interrupt:
    """While it holds, the first Ctrl-C or SIGTERM only sets `asked`, so that a step can be ended and saved; the next one kills.

    Under torchrun the next ones do nothing: torchrun passes on a signal that the terminal has sent to all already, and kills by itself later."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> "Interrupt":
        self.asked, self.before = False, {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def _ask(self, *_) -> None:
        self.asked = True
        if not dist.is_initialized():
            self.__exit__()

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """metrics.jsonl: one row a line. Rows after `step` and validations after `validated` (a run that is resumed repeats them) are dropped first."""

    def __init__(self, out: Path, step: int, validated: int):
        self.path, self.started = out / "metrics.jsonl", time.time()
        rows = [row for row in read_log(out) if row["step"] <= (validated if "val" in row else step)] if step else []
        with writing(self.path):
            partial = self.path.with_name(".metrics.jsonl.part")
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
            partial.replace(self.path)

    def row(self, **values) -> None:
        """Appends a row, with the seconds since this process began to train. Raises ModelError where the disk is full."""
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps({**values, "seconds": round(time.time() - self.started, 2)}) + "\n")


def read_log(out: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, without a last line that was cut short (a full disk)."""
    path, rows = out / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def plot_losses(out: Path) -> None:
    """loss.png: the loss and its parts by step, and recall on validation."""
    from matplotlib.figure import Figure  # not pyplot: its state, and so a notebook's plots, stay as they are

    rows = read_log(out)
    steps = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "val" in row]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    parts = ("L_s", "L_sup", "L_ce") if steps and "L_s" in steps[0] else ()  # of X-Pool, L_ce is the loss
    for name in [name for name in ("loss", *parts) if steps and name in steps[0]]:
        left.plot([row["step"] for row in steps], [row[name] for row in steps], label=name)
    left.set(xlabel="step", ylabel="loss", title="training")
    left.legend()
    for name in ("R@1", "R@5", "R@10"):
        right.plot([row["step"] for row in validations], [row["val"]["t2v"][name] for row in validations], "o-", label=name)
    right.set(xlabel="step", ylabel="text-to-video, % of queries", title="validation", ylim=(0, 100))
    right.legend()
    figure.savefig(out / "loss.png", dpi=120)


def git_commit() -> str:
    """The commit of this code, "unknown" outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Anything wrong with the input ends it with one sentence and exit code 1."""
    try:
        config = parse(arguments)
        join_processes(config.device)
        train(config)
    except (DataError, ModelError) as error:
        rank, _ = rank_and_world()
        sys.exit(f"error (process {rank}): {error}" if rank else f"error: {error}")
    except KeyboardInterrupt as stop:
        if rank_and_world()[0] == 0:
            print(str(stop) or "stopped")
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
