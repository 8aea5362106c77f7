"""Evaluation of T-MASS ("Inference Pipeline", "Evaluation Metrics"): scores of every text with every video, ranks, tables.

Features first, then scores, then ranks. A score is made of one text and one video and nothing else; which text belongs to which video
is known to `retrieval_metrics` alone. So no score can profit from the pairing (the released evaluator's does: README, "The leak").

    python evaluate.py --M 20                                    # the latest run, on its test split
    python evaluate.py --checkpoint runs/a runs/b --M 20         # several, side by side
"""

import hashlib
import json
import platform
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

import data
from data import Clip, ClipDataset, DataError, FrameCache
from losses import cosine_scores
from model import TMASS, ModelError, XPool, build_from_checkpoint, load_file, stochastic_text

# ------------------------------------------------------------------------------------------------- features: phi_t and phi_v, once


@dataclass(frozen=True)
class Features:
    """What evaluation sees of a data set: text (texts, dim), frames (videos, frames, dim), and owner (texts,), the video each
    text describes, which only the metrics read."""

    text: Tensor
    frames: Tensor
    owner: Tensor


@torch.no_grad()
def extract_features(model: TMASS, clips: Sequence[Clip], cache: FrameCache, batch: int = 32, workers: int = 0, amp: bool = False) -> Features:
    """phi_t of every caption and phi_v of every frame, in eval mode, on the model's device; float32."""
    training, device = model.training, model.logit_scale.device
    model.eval()
    dataset = ClipDataset(clips, cache, model.clip.context_length)
    order = [list(range(k, min(k + batch, len(clips)))) for k in range(0, len(clips), batch)]
    frames, text = [], []
    with torch.autocast(device.type, torch.bfloat16, enabled=amp and device.type == "cuda"):
        for images, _ in tqdm(data.batches(dataset, order, workers), total=len(order), desc="features", disable=len(order) < 20, leave=False):
            frames.append(model.encode_frames(data.normalise(images.to(device))))
        for tokens in torch.cat(dataset.tokens).split(8 * batch):
            text.append(model.encode_text(tokens.to(device)))
    model.train(training)
    owner = torch.repeat_interleave(torch.arange(len(clips)), torch.tensor([len(clip.captions) for clip in clips]))
    return Features(torch.cat(text), torch.cat(frames), owner.to(device))


# ------------------------------------------------------------------------------------------------------------------------- scores


def noise_bank(M: int, dim: int, seed: int, prior: str = "normal", std: float = 1.0) -> Float[Tensor, "M dim"]:
    """eps_1 .. eps_M, drawn once and shared by all pairs: the same on every device, whatever is scored with it.

    prior "normal": N(0, std^2), the paper's with std = 1; "uniform": U(0, 1), the released code's default."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(M, dim, generator=generator) if prior == "uniform" else std * torch.randn(M, dim, generator=generator)


def scores_literal(
    model: TMASS,
    text: Float[Tensor, "texts dim"],
    frames: Float[Tensor, "videos frames dim"],
    noise: Float[Tensor, "M dim"],
) -> Float[Tensor, "texts videos"]:
    """The score of every pair, as the paper writes it ("Inference Pipeline"): the best of M draws.

        score[i, j] = max_m cos(t_s, v),    v = psi(t_i, frames_j),    t_s = t_i + R(t_i, frames_j) eps_m

    Both v and t_s belong to the pair (i, j). The released evaluator pools video j by its own caption for every i: that leaks the
    pairing. With M = 0, or a method without a mass, t itself is scored. Small and plain: the oracle for `scores`."""
    video = model.fusion(text, frames)  # (texts, videos, dim)
    if model.radius is None or len(noise) == 0:
        return cosine_scores(text, video)
    t_s = stochastic_text(text, model.radius(text, frames), noise)  # (M, texts, videos, dim)
    return torch.stack([cosine_scores(draw, video) for draw in t_s]).amax(dim=0)


@torch.no_grad()
def scores(
    model: TMASS,
    text: Float[Tensor, "texts dim"],
    frames: Float[Tensor, "videos frames dim"],
    noise: Float[Tensor, "M dim"],
    block: int = 2**10,
    progress: bool = False,
) -> Float[Tensor, "texts videos"]:
    """The same numbers as `scores_literal`, in blocks of about `block` pairs: fast, and in memory that grows with neither texts x
    videos x dim nor M.

    psi: everything behind the attention weights a is linear in a, up to two scalars. With u_k the value of frame k,
        y_k = W_o u_k + b_o             (sum_k a_k = 1 folds the bias in)           o = LN2(sum_k a_k y_k)
        LN2's variance is a' G a, G the Gram matrix of the centred y_k; z_k = (I + P) (gamma2 y_k) is computed once a frame, so
        x = (sum_k a_k z_k) / sigma + c                                             v = LN3(x)
    and the dim x dim products leave the loop over pairs. Several heads are more k.
    t_s: with E the noise (M, dim), M draws of a pair cost three matrix products and no (M, texts, videos, dim) tensor:
        t_s . v = t . v + (R v) E',         |t_s|^2 = |t|^2 + 2 (R t) E' + (R R) (E E)'
    """
    noise = noise.to(text)
    columns = max(1, min(len(frames), block // 16))
    rows = max(1, block // columns)
    out = text.new_empty(len(text), len(frames))
    starts = range(0, len(frames), columns)
    for v in tqdm(starts, desc="scores", leave=False, disable=not progress or len(starts) < 20):
        fused = _collapse(model, frames[v : v + columns])
        for t in range(0, len(text), rows):
            out[t : t + rows, v : v + columns] = _block_scores(model, text[t : t + rows], fused, noise)
    return out


@dataclass(frozen=True)
class _Collapsed:
    """A block of videos with all of psi that does not depend on the text (see `scores`); k runs over heads x frames."""

    unit: Tensor  # frames / |frames|                 (videos, frames, dim)
    key: Tensor  # W_k LN1(f), a head at a time      (heads, videos * frames, dim / heads)
    z: Tensor  # centred (I + P) gamma2 y_k        (videos, heads * frames, dim)
    gram: Tensor  # of the centred y_k                (videos, heads * frames, heads * frames)
    c: Tensor  # centred (I + P) beta2 + p         (dim,)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=-1, keepdim=True)


def _collapse(model: TMASS, frames: Tensor) -> _Collapsed | Tensor:
    unit = F.normalize(frames, dim=-1)
    psi = model.fusion
    if not isinstance(psi, XPool):
        return unit
    dim = frames.shape[-1]
    normed = psi.norm1(frames)
    key = psi.key(normed).unflatten(-1, (psi.heads, -1)).permute(2, 0, 1, 3).flatten(1, 2)
    value = psi.value(normed).unflatten(-1, (psi.heads, -1))  # (videos, frames, heads, dim / heads)
    out = psi.out.weight.unflatten(-1, (psi.heads, -1))  # (dim, heads, dim / heads)
    y = _centred(torch.einsum("vfhe,dhe->vhfd", value, out).flatten(1, 2) + psi.out.bias / psi.heads)
    z = y * psi.norm2.weight
    z = _centred(z + F.linear(z, psi.linear.weight))
    c = _centred(psi.norm2.bias + psi.linear(psi.norm2.bias))
    return _Collapsed(unit, key, z, y @ y.mT / dim, c)


def _block_scores(model: TMASS, text: Tensor, fused: _Collapsed | Tensor, noise: Tensor) -> Tensor:
    if isinstance(fused, Tensor):
        video = F.normalize(fused.mean(dim=1), dim=-1)
        return F.normalize(text, dim=-1) @ video.T
    psi = model.fusion
    videos, count, dim = fused.unit.shape
    query = psi.query(psi.norm1(text)).unflatten(-1, (psi.heads, -1)).transpose(0, 1)  # (heads, texts, dim / heads)
    logits = (query @ fused.key.mT / query.shape[-1] ** 0.5).unflatten(-1, (videos, count))
    a = logits.softmax(dim=-1).permute(2, 1, 0, 3).flatten(2)  # (videos, texts, heads * frames)
    sigma = ((a @ fused.gram * a).sum(dim=-1, keepdim=True) + psi.norm2.eps).sqrt()
    x = torch.baddbmm(fused.c.expand(videos, len(text), dim), a / sigma, fused.z)  # (videos, texts, dim), centred
    deviation = (x.square().mean(dim=-1, keepdim=True) + psi.norm3.eps).sqrt()
    video = torch.addcmul(psi.norm3.bias, x / deviation, psi.norm3.weight)
    dot = (video * text).sum(dim=-1)  # t . v, (videos, texts)
    length = video.norm(dim=-1).clamp_min(1e-12)
    if model.radius is None or len(noise) == 0:
        return (dot / (length * text.norm(dim=-1).clamp_min(1e-12))).T
    radius = model.radius(text, fused.unit).transpose(0, 1)  # (videos, texts, dim)
    dots = dot[..., None] + (radius * video) @ noise.T  # (videos, texts, M)
    squares = text.square().sum(dim=-1)[:, None] + 2 * (radius * text) @ noise.T + radius.square() @ noise.square().T
    return ((dots / squares.clamp_min(1e-24).sqrt()).amax(dim=-1) / length).T


# ------------------------------------------------------------------------------------------------------------------------ metrics


def retrieval_metrics(scores: Float[Tensor, "texts videos"], owner: Int[Tensor, " texts"]) -> dict[str, dict[str, float]]:
    """R@1/5/10/50 (percent of queries), MdR and MnR (median and mean rank, from 1), text-to-video and video-to-text.

    text-to-video  every caption is a query; the rank of its own video among all videos.
    video-to-text  every video that has a caption is a query; the rank of the best of its own captions among all captions.
    Ties rank at their expected place: constant scores are at chance, not first. Raises ModelError for NaN or infinite scores."""
    if not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).sum())
        raise ModelError(f"{bad} of {scores.numel()} scores are NaN or infinite: the checkpoint is broken; they cannot be ranked.")
    own = torch.zeros_like(scores, dtype=torch.bool)
    own[torch.arange(len(owner), device=own.device), owner.to(own.device)] = True
    directions = {"t2v": (scores, own), "v2t": (scores.T, own.T)}
    return {name: _summary(_ranks(s[o.any(dim=1)], o[o.any(dim=1)])) for name, (s, o) in directions.items()}


def _ranks(scores: Float[Tensor, "queries items"], own: Tensor) -> Float[Tensor, " queries"]:
    """Expected rank of the best own item, ties broken at random: g items above it; k own and e other items share its score."""
    best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    above = (scores > best).sum(dim=1)
    level = (scores == best).sum(dim=1)
    k = ((scores == best) & own).sum(dim=1)
    return above + (level + 1) / (k + 1)


def _summary(ranks: Float[Tensor, " queries"]) -> dict[str, float]:
    recall = {f"R@{k}": (ranks <= k).double().mean().item() * 100 for k in (1, 5, 10, 50)}
    return {**recall, "MdR": ranks.double().quantile(0.5).item(), "MnR": ranks.double().mean().item()}


COLUMNS = ("R@1", "R@5", "R@10", "MdR", "MnR")


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """Metrics of several runs as a markdown table: a row a run, text-to-video on the left, video-to-text on the right."""
    width = max(len(name) for name in [*rows, "method"])
    head = f"| {'method':<{width}} |" + "".join(f" {d} {c:<4} |" for d in ("t2v", "v2t") for c in COLUMNS)
    rule = f"|{'-' * (width + 2)}|" + "---------:|" * 2 * len(COLUMNS)
    lines = [f"| {name:<{width}} |" + "".join(f" {m[d][c]:>8.1f} |" for d in ("t2v", "v2t") for c in COLUMNS) for name, m in rows.items()]
    return "\n".join([head, rule, *lines])


# ------------------------------------------------------------------------------------------------------------------------ pictures


def contact_sheet(
    path: Path,
    scores: Float[Tensor, "texts videos"],
    owner: Int[Tensor, " texts"],
    clips: Sequence[Clip],
    cache: FrameCache,
    queries: int = 6,
    shown: int = 5,
    seed: int = 0,
) -> None:
    """A picture of what was found: random captions, each with the clips that rank first for it (three frames a clip).

    The caption's own clip has a green frame; its rank is written under the caption. The captions are drawn by `seed`, not chosen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    captions = [caption for clip in clips for caption in clip.captions]
    chosen = np.sort(np.random.default_rng(seed).permutation(len(captions))[:queries])
    shown = min(shown, len(clips))
    figure, axes = plt.subplots(len(chosen), shown + 1, figsize=(2.7 * (shown + 1), 1.15 * len(chosen)), squeeze=False,
                                gridspec_kw=dict(width_ratios=[1.15] + [1] * shown, wspace=0.05, hspace=0.18))  # fmt: skip
    for row, text in zip(axes, chosen):
        own = int(owner[text])
        order = scores[text].argsort(descending=True, stable=True).tolist()
        words = textwrap.fill(captions[text], 30, max_lines=4)
        row[0].text(0, 0.5, f"{words}\n", fontsize=9.5, va="center")
        row[0].text(0, 0, f"own clip: rank {order.index(own) + 1} of {len(clips)}", fontsize=8, color="0.4", va="bottom")
        for axis, video in zip(row[1:], order):
            frames = cache.frames(clips[video])
            side = min(frames.shape[1:3])
            top, left = (frames.shape[1] - side) // 2, (frames.shape[2] - side) // 2
            picked = [frames[k, top : top + side, left : left + side] for k in data.segment_midpoints(len(frames), 3)]
            axis.imshow(np.concatenate(picked, axis=1))
            if video == own:
                axis.add_patch(plt.Rectangle((0, 0), 1, 1, transform=axis.transAxes, fill=False, color="#009e73", linewidth=5))
    for axis in axes.flat:
        axis.axis("off")
    for rank, axis in enumerate(axes[0, 1:], start=1):
        axis.set_title(f"rank {rank}", fontsize=9)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


# -------------------------------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class EvaluationConfig:
    """What to evaluate, and how. What is not given here is taken from the checkpoint."""

    checkpoint: tuple[Path, ...] = ()
    """runs (folders: their best.pt) or checkpoint files; default: the latest run under runs/"""
    M: int = 20
    """texts drawn for each text-video pair ("Inference Pipeline"); 0 scores t itself"""
    seed: int = 0
    """of the noise bank"""
    split: Literal["test", "val"] = "test"
    """which clips; choices belong to val, the test split to the end"""
    dataset: str | None = None
    """another data set than the run's own"""
    annotations: Path | None = None
    """for csv: a file of video,caption[,split]"""
    videos: Path | None = None
    """for csv: the folder of video files"""
    data: Path = Path("data")
    """folder of data sets and of the cache of decoded frames"""
    out: Path | None = None
    """folder for results.json and retrieved.png; default: each run's own"""
    batch: int = 32
    """clips encoded at once"""
    workers: int = 0
    """processes that load clips ahead"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    amp: bool = True
    """bfloat16 autocast of CLIP, on CUDA; scores are float32"""


def choose_device(name: str) -> torch.device:
    """auto: CUDA where there is one, else the CPU. Raises ModelError for a device that is not there or not known."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"--device {name}: torch finds no CUDA device on this machine; leave --device away to use the CPU.")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ModelError(f"--device {name}: not a device; choose auto, cpu or cuda.") from None


def latest_run(runs: Path = Path("runs")) -> Path:
    """The run whose best.pt is newest. Raises ModelError when there is none."""
    found = sorted(runs.glob("**/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ModelError(f"no checkpoint under {runs}/: train first (python train.py), or name one by --checkpoint.")
    return found[-1].parent


def open_checkpoint(path: Path) -> tuple[TMASS, dict, Path]:
    """The model of a run or of a file, the config it was trained with, and the file. Raises ModelError."""
    file = path / "best.pt" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{file} not found: train first (python train.py), or name a run or checkpoint by --checkpoint.")
    content = load_file(file)
    return build_from_checkpoint(content, file), content.get("config", {}), file


def evaluate(config: EvaluationConfig, path: Path) -> dict:
    """Evaluates one checkpoint; writes results.json and retrieved.png; returns what results.json holds."""
    started = time.time()
    device = choose_device(config.device)
    model, trained, file = open_checkpoint(path)
    model = model.to(device)
    dataset = config.dataset or trained.get("dataset", "shapes")
    sources = [getattr(config, name) or (Path(trained[name]) if trained.get(name) else None) for name in ("annotations", "videos")]
    clips = data.of_split(data.read_clips(dataset, config.data, *sources), config.split)
    cache = FrameCache(config.data / "cache", model.arguments["num_frames"], model.resolution)
    cache.fill(clips)
    features = extract_features(model, clips, cache, config.batch, config.workers, config.amp)
    seconds_features = time.time() - started

    started = time.time()
    M = config.M if model.radius is not None else 0
    noise = noise_bank(M, features.text.shape[1], config.seed, trained.get("prior", "normal"), trained.get("prior_std", 1.0))
    matrix = scores(model, features.text, features.frames, noise, progress=True)
    metrics = retrieval_metrics(matrix, features.owner)
    result = {
        "checkpoint": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "method": model.arguments["method"],
        "dataset": dataset,
        "split": config.split,
        "texts": len(features.text),
        "videos": len(features.frames),
        "M": M,
        "seed": config.seed,
        "metrics": metrics,
        "seconds": {"features": round(seconds_features, 2), "scores": round(time.time() - started, 2)},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}, torch {torch.__version__}",
        "trained": trained,
    }
    out = config.out / file.parent.name if config.out else file.parent
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    contact_sheet(out / "retrieved.png", matrix.cpu(), features.owner.cpu(), clips, cache)
    return {**result, "out": str(out)}


METHODS = {"clip": "mean pooling", "xpool": "X-Pool", "tmass": "T-MASS"}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Anything wrong with the input ends it with one sentence and exit code 1."""
    import tyro

    config = tyro.cli(EvaluationConfig, args=arguments, description=__doc__)
    try:
        rows, results = {}, []
        for path in config.checkpoint or (latest_run(),):
            results.append(result := evaluate(config, path))
            name = METHODS[result["method"]] + (f", M = {result['M']}" if result["M"] else "")
            rows[name if name not in rows else f"{name} ({path})"] = result["metrics"]
    except (DataError, ModelError) as error:
        sys.exit(f"error: {error}")
    r = results[0]
    print(f"{r['dataset']}, {r['split']} split: {r['texts']} captions x {r['videos']} videos, every pair scored without its pairing; "
          f"chance: R@10 {min(100, 1000 / r['videos']):.1f}, MdR {(r['videos'] + 1) / 2:.0f}\n")  # fmt: skip
    print(table(rows))
    print("\n" + "\n".join(f"written: {result['out']}/results.json, retrieved.png" for result in results))


if __name__ == "__main__":
    main()
