"""Settings of training and evaluation. Each dataclass is a command line, its --help and the record of a run.

A preset holds the settings of a data set, a recipe those of a way to train the mass; a flag wins over both.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, TypeVar

from engine.controls import CONTROLS as CONTROLS  # adds its psi to FUSIONS
from engine.datasets import DATASETS
from engine.ffmpeg import MAX_PIXELS, TIME_LIMIT
from engine.files import ModelError
from engine.masses import TwoMasses as TwoMasses  # adds the psi, radii and loss of its file
from engine.scoring import Delta, Expectation, MonteCarlo, Noise, PairNoise, noise_bank
from model import FUSIONS, RADII

# ---- training: the comment or docstring of a field is its text in --help


@dataclass(frozen=True)
class Config:
    """All settings of a training run. docs/training.md compares them with the paper and the released code."""

    dataset: str = "shapes"
    """data set; shapes: built in, trains on a CPU in minutes; csv: your own"""
    annotations: Path | None = None
    """csv: a file of video,caption[,split]; others: the folder of annotations, default DATA/DATASET"""
    videos: Path | None = None  # folder of the video files; required for csv; default: DATA/DATASET
    data: Path = Path("data")  # folder of the data sets and of the cache of decoded frames
    out: Path | None = None  # folder of this run; default: runs/DATASET-ARCH-METHOD, numbered if it exists
    resume: bool = False  # continue from the last checkpoint in --out; without one, start a new run

    method: Literal["clip", "xpool", "tmass"] = "tmass"
    """clip: mean pooling; xpool: X-Pool; both without a mass. tmass: any --fusion and --radius"""
    fusion: str = "xpool"
    """psi, which pools the frames of a video; xpool: text-conditioned attention; mean: mean pooling"""
    radius: str = "linear"
    """R; fixed: exp(mean S); scalar: exp(theta mean S); linear: exp(S W + b), the paper's with a bias; joint:
    from t and v too, not in the paper; none: no mass"""
    recipe: Literal["paper", "released", "best"] = "paper"
    """preset of the flags below; paper: as published; released: as the authors' commands, also for xpool;
    best: R from t and v, trained for ranking"""
    arch: str = "ViT-B/32"  # tiny, ViT-B/32, ViT-B/16, or a file of CLIP weights
    weights: Path | None = None  # file of CLIP weights, for machines without network
    freeze: Literal["none", "vision", "clip"] = "none"
    """vision: phi_v is fixed and its features are computed once; clip: phi_t too"""
    num_frames: int = 12  # T', frames per video
    sampling: Literal["uniform", "random"] = "uniform"
    """training frames; uniform: midpoints of T' segments; random: one of five positions in each segment"""
    heads: int = 1  # attention heads of psi
    dropout: float = 0.3  # dropout in psi
    initial_radius: float = 1.0  # exp(b) of linear and joint, close to R at the start of training
    radius_start: Literal["random", "identity"] = "random"
    """W of linear and joint; random: torch's; identity: 1 where channel k meets frame k, else 0 (released)"""
    prior: Literal["normal", "uniform"] = "normal"
    """eps ~ N(0, prior_std^2), the paper's; uniform: U(0, 1), the default of the released code"""
    prior_std: float = 1.0  # standard deviation of the normal prior
    pairs: Literal["matched", "every", "draws", "soft", "delta"] = "matched"
    """the scores in L_s; matched: t_s is drawn for matched pairs only (released code); every: once for every
    pair; draws: the best of M draws for every pair, as in inference; soft: log mean exp over them, at the
    temperature; delta: no draw, the closed form of --score delta"""
    alpha: float = 1.2  # weight of L_sup, the support-text loss
    ce: float = 0.0  # weight of L_ce, the loss of t itself, next to L_s
    inclusion: float = (
        0.0  # weight of L_inc, by which a general caption's mass includes others; not in the paper
    )
    M: int = 20  # texts drawn per pair in validation; also the M of --pairs draws, soft, delta

    epochs: int = 5  # passes over the captions; each at most once a pass
    max_steps: int | None = None  # stop after this many steps; the schedule ends there too
    batch: int = 32  # text-video pairs per step
    clip_lr: float = 1e-6  # AdamW's learning rate of CLIP
    head_lr: float = 3e-5  # learning rate of psi and R
    radius_lr: float | None = None
    """learning rate of R; default: head_lr, at which W barely moves from its initialisation"""
    weight_decay: float = 0.2  # of all parameters, biases and norms included, as in the released code
    adam_eps: float = 1e-8  # AdamW's eps; 1e-6 in the released code
    warmup: float = 0.1  # fraction of the steps in which the rate rises; then cosine decay
    grad_clip: float = 1.0  # largest gradient norm
    augment: bool = True  # random crops and flips, the same for all frames of a clip
    val: str = "official"
    """validation; official: the data set's own, else clips held out from training; a number: so many training
    videos, chosen by the seed; none: train on held-out clips too, and best.pt is the last epoch's"""
    seed: int = 0  # of initialisation, order, augmentation, dropout and noise
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps, ...
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """autocast of CLIP; weights, psi, R, scores, losses stay float32; auto: bf16 on CUDA, off on the CPU"""
    micro_batch: int | None = None
    """pairs each process encodes at a time; same gradients, less memory, a second forward pass of CLIP"""
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of CLIP's encoders; auto: on CUDA
    workers: int = 0  # processes that load batches in advance
    save_every: int = 0  # steps between checkpoints, besides the one after each epoch
    max_pixels: int = MAX_PIXELS  # of a frame; a video with larger frames is refused
    time_limit: float = TIME_LIMIT  # seconds to read a file, plus 300 a MiB of it; longer: refused

    @property
    def eps(self) -> dict[str, str | float]:
        """The distribution of eps, as `model.sample_noise` takes it."""
        return dict(prior=self.prior, std=self.prior_std)


# The --fusion and --radius of each method.
METHODS = {"clip": ("mean", "none"), "xpool": ("xpool", "none"), "tmass": ("xpool", "linear")}
# Settings of a data set that differ from the defaults. LSMDC's rate is that of the released commands.
PRESETS: dict[str, dict] = {
    **{name: dict(workers=8) for name in DATASETS if name != "csv"},
    "shapes": dict(
        arch="tiny",
        freeze="clip",
        weight_decay=0.01,
        augment=False,
        batch=64,
        clip_lr=3e-4,
        head_lr=5e-4,
        epochs=3,
    ),
    "lsmdc": dict(head_lr=1e-5, workers=8),
}
# best: R reads t and v; a pair's training score is an approximate best of M draws, so that R learns to rank.
BEST = dict(radius="joint", pairs="delta", alpha=0.0, ce=0.5, radius_lr=1e-3)
# released: what the released code of T-MASS trains with; and what its commands and X-Pool's say of a data set
RELEASED = dict(alpha=0.0, prior="uniform", adam_eps=1e-6, radius_start="identity")
COMMANDS: dict[tuple[str, str], dict] = {
    ("tmass", "msrvtt"): dict(head_lr=3e-5, dropout=0.3, alpha=0.8),
    ("tmass", "lsmdc"): dict(head_lr=1e-5, dropout=0.3, prior="normal", prior_std=0.003),
    ("tmass", "didemo"): dict(head_lr=1e-5, dropout=0.4),
    ("xpool", "msrvtt"): dict(head_lr=3e-5, dropout=0.3),
    ("xpool", "msrvtt-7k"): dict(head_lr=1e-5, dropout=0.4),
    ("xpool", "msvd"): dict(head_lr=1e-5, dropout=0.4),
    ("xpool", "lsmdc"): dict(head_lr=1e-5, dropout=0.3),
}
RECIPES: dict[str, dict] = {"paper": {}, "released": RELEASED, "best": BEST}
# Flags that may change when a run is resumed. They change its numbers by rounding at most.
FREE = {"out", "resume", "data", "annotations", "videos", "device", "workers", "save_every"}
FREE |= {"amp", "micro_batch", "compile", "max_pixels", "time_limit"}


def preset(dataset: str, method: str, recipe: str | None = None) -> Config:
    """The defaults for a data set, a method and a recipe (default: paper), before any flag."""
    fusion, radius = METHODS[method]
    names = dict(dataset=dataset, method=method, fusion=fusion, radius=radius, recipe=recipe or "paper")
    flags = RECIPES[names["recipe"]] if method == "tmass" else {}
    if recipe == "released" and method == "xpool":
        flags = dict(adam_eps=RELEASED["adam_eps"])
    if recipe == "released":
        flags = {**flags, **COMMANDS.get((method, dataset), {})}
    return replace(Config(), **{**PRESETS.get(dataset, {}), **names, **flags})


def loss_weights(config: Config) -> dict[str, float]:
    """The weight of each loss of losses.LOSSES; 0 leaves a loss out."""
    if config.radius == "none":
        return {"L_ce": 1.0, "L_s": 0.0, "L_sup": 0.0, "L_inc": 0.0}
    return {"L_ce": config.ce, "L_s": 1.0, "L_sup": config.alpha, "L_inc": config.inclusion}


# ---- evaluation


@dataclass(frozen=True)
class EvaluationConfig:
    """What to evaluate and how. Settings that are not given come from the checkpoint."""

    checkpoint: tuple[Path, ...] = ()  # runs or checkpoint files; default: the latest run under runs/
    M: int = 20  # texts drawn per text-video pair ("Inference Pipeline"); 0 scores t itself
    score: Literal["sampled", "mean", "expected", "mc", "delta"] = "sampled"
    """sampled: best of M draws (the paper); mean: t itself; expected: the expected best of M, by the exact
    moments of a score; mc: the same by Monte Carlo, 50 banks of M draws, more where M < 20; delta: a closed
    form that is the expectation only where R is nearly even over channels; --recipe best trains with it"""
    prior: Literal["normal", "uniform"] | None = None
    """of eps; default: as in training; released checkpoints: uniform, and N(0, 0.003^2) for LSMDC"""
    prior_std: float | None = None  # standard deviation of the normal prior; default: as in training
    noise: Literal["shared", "independent"] = "shared"
    """shared: the same M draws for all pairs; independent: new draws for each pair (slow)"""
    protocol: Literal["paper", "released"] = "paper"
    """released: pools each video by its own caption, as the released evaluator; it LEAKS the pairing"""
    dsl: Literal["none", "temperature", "released"] = "none"
    """dual softmax; transductive: uses all test queries at once; temperature (or --dsl alone): at the model's
    own, over the queries; released: at 1/100, over the texts both ways, as in the released code"""
    captions: Literal["all", "first", "joined"] = "all"
    """all: each caption is a query; first: one caption per clip; joined: all of a clip as one query"""
    seed: int = 0  # of the noise
    split: Literal["test", "val"] = "test"  # make choices on val, report test
    dataset: str | None = None  # default: that of the run; required for released checkpoints
    annotations: Path | None = None  # csv: a file of video,caption[,split]
    videos: Path | None = None  # csv: folder of the video files
    data: Path = Path("data")  # folder of the data sets and of the cache of decoded frames
    out: Path | None = None  # folder of the results; default: that of the run
    allow_missing: bool = False
    """leave out unreadable videos and report how many; they are an error otherwise"""
    batch: int = 32  # clips encoded at once
    workers: int = 0  # processes that load clips in advance
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps, ...
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """autocast of CLIP; scores stay float32; auto: bf16 on CUDA, off on the CPU"""
    max_pixels: int = MAX_PIXELS  # of a frame; a video with larger frames is refused
    time_limit: float = TIME_LIMIT  # seconds to read a file, plus 300 a MiB of it; longer: refused


def prior_of(config: EvaluationConfig, trained: dict, dataset: str) -> dict:
    """The noise to draw, {"prior", "std"}: the flags', else that of training or of the released code.

    Raises ModelError for a --prior-std or a --score that the prior does not have."""
    released = dict(prior="normal", prior_std=0.003) if dataset == "lsmdc" else dict(prior="uniform")
    own = released if trained.get("released") else trained
    prior = config.prior or own.get("prior", "normal")
    if prior == "uniform" and config.score == "expected":
        raise ModelError("--score expected needs the normal prior, and this is U(0, 1): use --score mc.")
    if prior == "uniform" and config.prior_std is not None:
        what = "--prior-std is that of the normal prior, and this checkpoint was trained with the uniform one"
        raise ModelError(f"{what}: add --prior normal, or leave it out.")
    return dict(prior=prior, std=own.get("prior_std", 1.0) if config.prior_std is None else config.prior_std)


def choose_noise(score: str, noise: str, M: int, dim: int, seed: int, first_video: int = 0, **prior) -> Noise:
    """The noise of --score and --noise; prior: "prior" and "std". Raises KeyError for an unknown --score."""
    if score in ("sampled", "mean"):
        if noise == "independent":
            return PairNoise(M, seed, **prior, first_video=first_video)
        return noise_bank(M, dim, seed, **prior)
    if score == "mc":
        return MonteCarlo(M, max(50, 1000 // max(1, M)), seed=seed, **prior)  # some 1,000 draws in all
    return {"expected": Expectation, "delta": Delta}[score](M, **prior)


# ---- checks

# Smallest and largest value of each number.
RANGES: dict[str, tuple[int | float, float]] = {
    **dict.fromkeys(("heads", "epochs", "max_steps", "batch", "micro_batch"), (1, math.inf)),
    **dict.fromkeys(("prior_std", "alpha", "ce", "inclusion", "save_every"), (0, math.inf)),
    **dict(
        max_pixels=(1, math.inf),
        time_limit=(0, math.inf),
        num_frames=(1, 1000),
        M=(0, 100_000),
        workers=(0, 1000),
        seed=(0, 10**9),
    ),
    **dict.fromkeys(("clip_lr", "head_lr", "radius_lr", "weight_decay"), (0, math.inf)),
    **dict.fromkeys(("initial_radius", "grad_clip"), (1e-6, math.inf)),
    **dict(adam_eps=(1e-12, 1)),
    **dict.fromkeys(("dropout", "warmup"), (0, 1)),
}


def registered(kind: type) -> dict[str, tuple[str, ...]]:
    """The names known for each field of a config that is chosen from a registry."""
    known = {"dataset": tuple(DATASETS), "fusion": tuple(FUSIONS), "radius": (*RADII, "none")}
    return {field.name: known[field.name] for field in fields(kind) if field.name in known}


def check_config(config: Config | EvaluationConfig) -> None:
    """Raises ModelError for a number out of range, an unknown name, or flags that contradict each other."""
    given = {field.name: getattr(config, field.name) for field in fields(config)}
    given = {name: value for name, value in given.items() if value is not None}
    for name, (low, high) in RANGES.items():
        if name in given and not low <= given[name] <= high:
            limits = f"from {low:g} {f'to {high:g}' if high < math.inf else 'on'}"
            raise ModelError(f"--{name.replace('_', '-')} {given[name]}: give a number {limits}.")
    for name, known in registered(type(config)).items():
        if name in given and given[name] not in known:
            raise ModelError(f"unknown --{name} {given[name]}: choose {', '.join(known)}.")
    if config.prior == "uniform" and config.prior_std != type(config).prior_std:  # it was given
        raise ModelError("--prior-std is that of the normal prior: leave it out, or --prior uniform.")
    if isinstance(config, EvaluationConfig):
        return
    method, freeze, parts = config.method, config.freeze, (config.fusion, config.radius)
    if config.val not in ("none", "official") and not re.fullmatch("0*[1-9][0-9]{0,8}", config.val):
        raise ModelError(f"--val {config.val}: give none, official, or a number of videos from 1 on.")
    if config.radius_start == "identity" and config.radius not in ("linear", "joint"):
        what = f"--radius-start identity starts W, which --radius {config.radius} does not have"
        raise ModelError(f"{what}: add --radius-start random, or use --radius linear or joint.")
    if method == "clip" and config.recipe == "released":
        raise ModelError("--recipe released: no command of mean pooling was released: leave it out.")
    if method != "tmass" and config.recipe == "best":
        raise ModelError(f"--recipe {config.recipe} trains a mass: leave it out, or use --method tmass.")
    if method != "tmass" and parts != METHODS[method]:
        means = "--fusion {} --radius {}".format(*METHODS[method])
        raise ModelError(f"--method {method} means {means}: leave out both, or use --method tmass.")
    if freeze != "none" and (config.augment or config.sampling == "random"):
        advice = "add --no-augment and keep --sampling uniform"
        raise ModelError(f"--freeze {freeze} computes the features of each clip once: {advice}.")
    if config.radius != "none" and config.pairs in ("draws", "soft", "delta") and config.M < 1:
        what = f"--M 0 leaves --pairs {config.pairs} no draw"
        raise ModelError(f"{what}: give 1 or more, or use --pairs matched.")


# ---- command lines

Kind = TypeVar("Kind", Config, EvaluationConfig)


def parse(arguments: Sequence[str] | None = None, description: str = "") -> Config:
    """The command line of train.py: the preset of --dataset, --method and --recipe, then all other flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="shapes", choices=DATASETS)
    first.add_argument("--method", choices=METHODS)
    first.add_argument("--recipe", choices=RECIPES)
    chosen, _ = first.parse_known_args(arguments)
    method = chosen.method or PRESETS.get(chosen.dataset, {}).get("method", "tmass")
    return _read(preset(chosen.dataset, method, chosen.recipe), arguments, description)


def parse_evaluation(arguments: Sequence[str] | None = None, description: str = "") -> EvaluationConfig:
    """The command line of evaluate.py."""
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    for at in [at for at, flag in enumerate(given) if flag == "--dsl"][::-1]:
        if given[at + 1 : at + 2] == [] or given[at + 1].startswith("-"):  # --dsl alone
            given.insert(at + 1, "temperature")
    return _read(EvaluationConfig(), given, description)


def _read(default: Kind, arguments: Sequence[str] | None, description: str) -> Kind:
    """Reads flags with tyro, by a subclass in which the names of the registries are the choices."""
    import tyro

    kind, known = type(default), registered(type(default))
    values = {name: getattr(default, name) for name in known}
    types = {name: Literal[(*names, values[name])] for name, names in known.items()}
    line = {"__firstlineno__": kind.__firstlineno__} if hasattr(kind, "__firstlineno__") else {}  # 3.13
    body = {**values, **line, "__annotations__": types, "__doc__": kind.__doc__, "__module__": __name__}
    listed = dataclass(frozen=True)(type(kind.__name__, (kind,), body))
    chosen = tyro.cli(listed, default=listed(**vars(default)), args=arguments, description=description)
    return kind(**vars(chosen))


# ---- records


def plain(config: Config) -> dict:
    """The config as strings and numbers, for checkpoints and results."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def upgrade_config(trained: dict) -> dict:
    """A recorded config in today's words: "pairs" was "expected" for delta, and earlier versions derived
    "fusion" and "radius" from "method"."""
    if trained.get("pairs") == "expected":
        trained = {**trained, "pairs": "delta"}
    if "method" not in trained or "fusion" in trained:
        return trained
    fusion, radius = METHODS[trained["method"]]
    radius = trained.get("radius", radius) if trained["method"] == "tmass" else radius
    return {**trained, "fusion": fusion, "radius": radius}


def changes(config: Config, recorded: dict) -> list[str]:
    """Each flag that differs from a recorded config, as "name before -> now"; flags in FREE may differ.

    A flag that did not exist yet when the run was started counts as left at its default."""
    before = {**plain(preset(config.dataset, config.method, "paper")), **upgrade_config(recorded)}
    now = {name: value for name, value in plain(config).items() if name not in FREE}
    if before["prior"] == "uniform":  # older versions took a --prior-std, which had no effect
        before["prior_std"] = now["prior_std"]
    return [f"{name} {before[name]} -> {value}" for name, value in now.items() if before[name] != value]


def method_of(fusion: str, radius: str) -> str:
    """The method with these parts: tmass with a mass; else clip for mean pooling, xpool for other psi."""
    return "tmass" if radius != "none" else "clip" if fusion == "mean" else "xpool"


def label(arguments: dict) -> str:
    """The name of a model in tables, such as "X-Pool" or "T-MASS, R joint"; takes TMASS.arguments."""
    fusion, radius = arguments["fusion"], arguments["radius"]
    known = {("mean", "none"): "mean pooling", ("xpool", "none"): "X-Pool", ("xpool", "linear"): "T-MASS"}
    psi = "T-MASS" if fusion == "xpool" else f"psi {fusion}"
    return known.get((fusion, radius), psi if radius == "none" else f"{psi}, R {radius}")
