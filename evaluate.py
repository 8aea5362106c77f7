"""Evaluation of T-MASS ("Inference Pipeline", "Evaluation Metrics"): scores of every text with every video, ranks, tables.

Features first, then scores, then ranks. A score is made of one text and one video and nothing else; which text belongs to which video
is known to `retrieval_metrics` alone. So no score can profit from the pairing (the released evaluator's does: README, "The leak").

    python evaluate.py --M 20                                    # the latest run, on its test split
    python evaluate.py --checkpoint runs/a runs/b --M 20         # several, side by side
    torchrun --nproc-per-node 2 evaluate.py --M 20               # videos split over processes, the same scores
"""

import functools
import hashlib
import json
import math
import os
import platform
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

import data
from data import Clip, ClipDataset, DataError, FeatureCache, FrameCache
from losses import cosine_scores
from model import TMASS, ModelError, XPool, build_from_checkpoint, is_released, load_file, stochastic_text

# ------------------------------------------------------------------------------------------------- features: phi_t and phi_v, once


@dataclass(frozen=True)
class Features:
    """What evaluation sees of a data set: text (texts, dim), frames (videos, frames, dim), and owner (texts,), the video each
    text describes, which only the metrics read."""

    text: Tensor
    frames: Tensor
    owner: Tensor


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """--amp: the precision of CLIP's products. auto: bfloat16 on CUDA (float16 where the GPU has no bfloat16), none on the CPU."""
    kind = resolve_amp(device, amp)
    return torch.autocast(device.type, torch.float16 if kind == "fp16" else torch.bfloat16, enabled=kind in ("bf16", "fp16"))


def resolve_amp(device: torch.device, amp: str) -> str:
    """bf16, fp16 or off: what --amp comes to on a device."""
    if amp != "auto":
        return amp
    return "off" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@torch.no_grad()
def extract_features(
    model: TMASS,
    clips: Sequence[Clip],
    cache: FrameCache,
    batch: int = 32,
    workers: int = 0,
    amp: str = "off",
    store: FeatureCache | None = None,
    keep: bool = False,
) -> Features:
    """phi_t of every caption and phi_v of every frame, in eval mode, on the model's device; float32.

    Features of clips that `store` holds are read from it; `keep`: the others are put into it, made without autocast."""
    training, device = model.training, model.logit_scale.device
    model.eval()
    dataset = ClipDataset(clips, cache, model.clip.context_length)
    frames: list[Tensor | None] = [store.load(clip) if store else None for clip in clips]
    todo = [k for k, known in enumerate(frames) if known is None]
    order = [todo[k : k + batch] for k in range(0, len(todo), batch)]
    text = []
    bar = functools.partial(tqdm, desc="features", total=len(order), disable=len(order) < 20, leave=False)
    with autocast(device, "off" if keep else amp):
        for numbers, (images, _) in zip(order, bar(data.batches(dataset, order, workers))):
            for k, features in zip(numbers, model.encode_frames(data.normalise(images.to(device)))):
                frames[k] = features
                if store and keep:
                    store.save(clips[k], features)
        for tokens in torch.cat(dataset.tokens).split(8 * batch):
            text.append(model.encode_text(tokens.to(device)))
    model.train(training)
    owner = torch.repeat_interleave(torch.arange(len(clips)), torch.tensor([len(clip.captions) for clip in clips]))
    return Features(torch.cat(text), torch.stack([known.to(device) for known in frames]), owner.to(device))


def feature_cache(cache: FrameCache, model: TMASS) -> FeatureCache:
    """Where the features that phi_v of this model makes are kept: beside the frames, by a hash of its weights."""
    return FeatureCache(cache, fingerprint(model.clip.visual))


def fingerprint(module: torch.nn.Module) -> str:
    """A hash of a module's weights, 16 hex digits."""
    weights = hashlib.sha256()
    for name, value in module.state_dict().items():
        weights.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return weights.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------------------- scores


def noise_bank(M: int, dim: int, seed: int, prior: str = "normal", std: float = 1.0) -> Float[Tensor, "M dim"]:
    """eps_1 .. eps_M, drawn once and shared by all pairs (--noise shared): the same on every device, whatever is scored with it.

    prior "normal": N(0, std^2), the paper's with std = 1; "uniform": U(0, 1), the released code's default."""
    return _draw(prior, std, (M, dim), seed)


def _draw(prior: str, std: float, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) if prior == "uniform" else std * torch.randn(shape, generator=generator)


@dataclass(frozen=True)
class PairNoise:
    """Fresh draws for each pair (--noise independent). The eps of pair (i, j) follows from seed, i and j: not from blocks or ranks.

    Costs a random number for each pair, draw and channel, where the shared bank costs three matrix products a block."""

    M: int
    seed: int = 0
    prior: str = "normal"
    std: float = 1.0
    first_video: int = 0  # the number of the first column, where a rank holds a part of the videos

    def block(self, texts: range, videos: range, dim: int) -> Float[Tensor, "M texts videos dim"]:
        """eps of the pairs of a block."""
        entropy = [np.random.SeedSequence([self.seed, i, self.first_video + j]).generate_state(1, np.uint64)[0] for i in texts for j in videos]
        draws = [_draw(self.prior, self.std, (self.M, dim), int(seed) & 2**63 - 1) for seed in entropy]
        return torch.stack(draws, dim=1).unflatten(1, (len(texts), len(videos)))


@dataclass(frozen=True)
class Expectation:
    """No draws: the expected best of M, from the mean and variance of a pair's score under eps (--score expected).

    eps has independent channels of mean mu and variance s^2. Write t' = t + mu R, X = t_s . v, N = |t_s|^2. Then
        E X = t' . v =: x          E N = |t'|^2 + s^2 |R|^2 =: n
    and with A = sum R^2 v^2, B = sum R^2 v t', C = sum R^2 t'^2 (sums over channels) the delta method gives for cos = X / (|v| sqrt N)
        mean = (x / n^(1/2) - s^2 B / n^(3/2) + 3/2 s^2 x C / n^(5/2)) / |v|          (second order)
        var  = s^2 (A - 2 (x / n) B + (x / n)^2 C) / (n |v|^2)                        (first order: only eps across t' turns it)
    As a sum over many channels the score is close to normal, so the best of M draws is expected at mean + c_M sqrt(var), with c_M the
    expected largest of M standard normals (c_1 = 0, c_20 = 1.867). It ranks without luck, at the cost of three sums a pair."""

    M: int
    prior: str = "normal"
    std: float = 1.0

    def of(self, text: Tensor, radius: Tensor, video: Tensor) -> Tensor:
        """The expected best score of each pair; the last axis, channels, is summed over."""
        mu, s2 = (0.5, 1 / 12) if self.prior == "uniform" else (0.0, self.std**2)
        t = text + mu * radius if mu else text
        r2 = radius.square()
        x = (t * video).sum(-1)
        n = (t.square().sum(-1) + s2 * r2.sum(-1)).clamp_min(1e-24)
        r2v, r2t = r2 * video, r2 * t
        A, B, C = (r2v * video).sum(-1), (r2v * t).sum(-1), (r2t * t).sum(-1)
        mean = (x - s2 * B / n + 1.5 * s2 * x * C / n.square()) / n.sqrt()
        variance = s2 * (A - 2 * (x / n) * B + (x / n).square() * C) / n
        return (mean + best_of(self.M) * variance.clamp_min(1e-20).sqrt()) / video.norm(dim=-1).clamp_min(1e-12)


@functools.cache
def best_of(M: int) -> float:
    """c_M: the expected largest of M standard normals, the integral of x d(Phi(x)^M)."""
    x = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    return torch.trapezoid(x * M * torch.special.ndtr(x) ** (M - 1) * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5, x).item()


def scores_literal(
    model: TMASS,
    text: Float[Tensor, "texts dim"],
    frames: Float[Tensor, "videos frames dim"],
    noise: Float[Tensor, "M dim"] | Float[Tensor, "M texts videos dim"],
) -> Float[Tensor, "texts videos"]:
    """The score of every pair, as the paper writes it ("Inference Pipeline"): the best of M draws.

        score[i, j] = max_m cos(t_s, v),    v = psi(t_i, frames_j),    t_s = t_i + R(t_i, frames_j) eps_m

    Both v and t_s belong to the pair (i, j). The released evaluator pools video j by its own caption for every i: that leaks the
    pairing. With M = 0, or a method without a mass, t itself is scored. Small and plain: the oracle for `scores`."""
    video = model.fusion(text, frames)  # (texts, videos, dim)
    if model.radius is None or len(noise) == 0:
        return cosine_scores(text, video)
    t_s = stochastic_text(text, model.radius(text, frames, video), noise)  # (M, texts, videos, dim)
    return torch.stack([cosine_scores(draw, video) for draw in t_s]).amax(dim=0)


@torch.no_grad()
def scores(
    model: TMASS,
    text: Float[Tensor, "texts dim"],
    frames: Float[Tensor, "videos frames dim"],
    noise: Float[Tensor, "M dim"] | PairNoise | Expectation,
    block: int | None = None,
    own_text: Float[Tensor, "videos dim"] | None = None,
    progress: bool = False,
) -> Float[Tensor, "texts videos"]:
    """The same numbers as `scores_literal`, fast, in blocks of about `block` pairs (default: what fits the cache, `default_block`).

    Memory is that of a block: it grows neither with texts x videos x dim nor with M.
    psi: everything behind the attention weights a is linear in a, up to two scalars. With u_k the value of frame k,
        y_k = W_o u_k + b_o,  centred over channels              (sum_k a_k = 1 folds the bias in)
        o   = gamma2 sum_k a_k y_k / sigma + beta2               sigma^2 = a' G a + eps,  G = Y Y' / dim: LN2
        x   = sum_k (a_k / sigma) z_k + c                        z_k = (I + P) gamma2 y_k,  c = (I + P) beta2 + p,  centred: LN3
        v   = gamma3 x / delta + beta3 = sum_k A_k atom_k        delta^2 = |x|^2 / dim + eps, again from Gram matrices
    so v is one product of T' + 2 coefficients a pair with T' + 2 atoms a video, and no dim x dim product is left in the loop over
    pairs (but for two of the radius "joint"); v . t and |v| come from the atoms as well. Several heads are more k.
    t_s: with E the noise bank (M, dim), M draws of a pair cost three products and no (M, texts, videos, dim) tensor:
        t_s . v = t . v + (R v) E',         |t_s|^2 = |t|^2 + 2 (R t) E' + (R R) (E E)'

    Few texts (a search engine's one query) take another order: pooling first, and projecting what was pooled, costs less than
    preparing every frame. `frames` may be of another type than the text (a float16 memory map): a block at a time is converted.
    own_text  the released protocol, which LEAKS: video j is pooled by own_text[j], its own caption, whatever the query."""
    dim = text.shape[1]
    block = block or default_block(dim, text.device)
    if isinstance(noise, PairNoise):
        block = max(1, block // max(1, noise.M))
    columns = max(1, min(len(frames), max(int(block**0.5), block // max(1, len(text)))))
    rows = max(1, block // columns)
    noise = noise.to(text) if isinstance(noise, Tensor) else noise
    queries = _Queries.of(model, text)
    out = text.new_empty(len(text), len(frames))
    room = text.new_empty(2, rows * columns, dim)  # memory for v and for R t, R R, once for all blocks: no new pages in the loop
    starts = range(0, len(frames), columns)
    for first in tqdm(starts, desc="scores", leave=False, disable=not progress or len(out) * len(frames) < 10**6):
        videos = slice(first, min(first + columns, len(frames)))
        fused = _Videos.of(model, queries, frames[videos].to(text), None if own_text is None else own_text[videos])
        for t in range(0, len(text), rows):
            texts = slice(t, min(t + rows, len(text)))
            out[texts, videos] = _score_block(model, queries, fused, texts, videos, noise, room)
    return out


def default_block(dim: int, device: torch.device) -> int:
    """Pairs a block: its three tensors (pairs, dim) fill half of the CPU's last cache, or a sixteenth of the GPU's free memory (the radius
    "joint" has some more).

    On the CPU between 2 and 8 MiB: measured best; larger blocks are new pages for every tensor, and slower by half."""
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] // 16
    else:
        try:
            cache = os.sysconf("SC_LEVEL3_CACHE_SIZE")
        except (ValueError, OSError, AttributeError):  # only Linux tells
            cache = 0
        room = min(max((cache or 2**24) // 2, 2**21), 2**23)
    return max(256, room // (3 * 4 * dim))


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=-1, keepdim=True)


@dataclass(frozen=True)
class _Queries:
    """What scoring needs of the texts, once."""

    text: Tensor  # (texts, dim)
    unit: Tensor  # text / |text|
    square: Tensor  # |text|^2                          (texts,)
    query: Tensor | None  # W_q LN1(t) / sqrt(dim / heads)    (heads, texts, dim / heads)

    @classmethod
    def of(cls, model: TMASS, text: Tensor) -> "_Queries":
        psi, query = model.fusion, None
        if isinstance(psi, XPool):
            query = psi.query(psi.norm1(text)).unflatten(-1, (psi.heads, -1)).transpose(0, 1)
            query = query / query.shape[-1] ** 0.5
        return cls(text, F.normalize(text, dim=-1), text.square().sum(-1), query)


@dataclass(frozen=True)
class _Videos:
    """What scoring needs of a block of videos (see `scores`): v of a pair is its coefficients times the atoms of its video."""

    unit: Tensor  # frames / |frames|                   (videos, frames, dim)
    atoms: Tensor | None = None  #                      (videos, k + 2, dim), or (videos, 1, dim) where v does not depend on the text
    gram: Tensor | None = None  # of the atoms          (videos, k + 2, k + 2)
    key: Tensor | None = None  # W_k LN1(f)             (heads, videos, frames, dim / heads)
    gram2: Tensor | None = None  # of LN2               (videos, k, k)
    gram3: Tensor | None = None  # of LN3               (videos, k + 1, k + 1)
    video: Tensor | None = None  # v itself, where texts are few: (videos, texts, dim); there are no atoms then

    @classmethod
    def of(cls, model: TMASS, queries: _Queries, frames: Tensor, own_text: Tensor | None) -> "_Videos":
        psi, (videos, count, dim), unit = model.fusion, frames.shape, F.normalize(frames, dim=-1)
        if not isinstance(psi, XPool):
            return cls.with_gram(unit, unit.mean(dim=1, keepdim=True))
        if own_text is not None:
            return cls.with_gram(unit, torch.stack([psi(t[None], f[None])[0] for t, f in zip(own_text, frames)]))
        if 3 * len(queries.text) < 4 * count:  # projecting after pooling costs 3 dim^2 a pair, preparing 4 dim^2 a frame
            return cls(unit, video=_pool_then_project(psi, queries.query, frames))
        normed = psi.norm1(frames)
        key = psi.key(normed).unflatten(-1, (psi.heads, -1)).permute(2, 0, 1, 3).contiguous()
        value = psi.value(normed).unflatten(-1, (psi.heads, -1))  # (videos, frames, heads, dim / heads)
        weight = psi.out.weight.unflatten(-1, (psi.heads, -1))  # (dim, heads, dim / heads)
        y = _centred(torch.einsum("vfhe,dhe->vhfd", value, weight).flatten(1, 2) + psi.out.bias / psi.heads)
        z = y * psi.norm2.weight
        z = _centred(z + F.linear(z, psi.linear.weight))
        c = _centred(psi.norm2.bias + psi.linear(psi.norm2.bias))
        z = torch.cat([z, c.expand(videos, 1, dim)], dim=1)
        atoms = torch.cat([z * psi.norm3.weight, psi.norm3.bias.expand(videos, 1, dim)], dim=1)
        return cls.with_gram(unit, atoms, key, y @ y.mT / dim, z @ z.mT / dim)

    @classmethod
    def with_gram(cls, unit: Tensor, atoms: Tensor, *rest: Tensor) -> "_Videos":
        return cls(unit, atoms, atoms @ atoms.mT, *rest)

    def coefficients(self, psi: torch.nn.Module, query: Tensor) -> Tensor:
        """A, of each pair with the given queries (heads, texts, dim / heads): (videos, k + 2, texts)."""
        if self.key is None:
            return self.atoms.new_ones(len(self.atoms), 1, query.shape[1])
        logits = torch.stack([_products(k, q) for k, q in zip(self.key, query)], dim=1)  # (videos, heads, frames, texts)
        a = logits.softmax(dim=2).flatten(1, 2)
        inverse_sigma = ((self.gram2 @ a * a).sum(dim=1, keepdim=True) + psi.norm2.eps).rsqrt()
        w = torch.cat([a * inverse_sigma, torch.ones_like(inverse_sigma)], dim=1)
        inverse_delta = ((self.gram3 @ w * w).sum(dim=1, keepdim=True) + psi.norm3.eps).rsqrt()
        return torch.cat([w * inverse_delta, torch.ones_like(inverse_delta)], dim=1)


def _products(y: Tensor, x: Tensor) -> Tensor:
    """Inner products of the k vectors of all videos (videos, k, dim) with all texts (texts, dim): (videos, k, texts)."""
    return (y.flatten(0, 1) @ x.T).unflatten(0, y.shape[:2])


def _pool_then_project(psi: XPool, query: Tensor, frames: Tensor) -> Tensor:
    """psi for few texts, (videos, texts, dim): W_k moves to the query's side and W_v behind the pooling, off the frames.

    q . (W_k x + b) = (W_k' q) . x + q . b, and what does not depend on the frame leaves the softmax as it is."""
    normed = psi.norm1(frames)
    moved = torch.einsum("hte,hed->htd", query, psi.key.weight.unflatten(0, (psi.heads, -1)))
    a = torch.einsum("htd,vfd->vhtf", moved, normed).softmax(dim=-1)
    pooled = a @ normed[:, None]  # (videos, heads, texts, dim)
    value = torch.einsum("vhtd,hed->vthe", pooled, psi.value.weight.unflatten(0, (psi.heads, -1))).flatten(-2) + psi.value.bias
    o = psi.norm2(psi.out(value))
    return psi.norm3(o + psi.linear(o))


def _score_block(
    model: TMASS, queries: _Queries, fused: _Videos, texts: slice, videos: slice, noise: Tensor | PairNoise | Expectation, room: Tensor
) -> Float[Tensor, "texts videos"]:
    text, square = queries.text[texts], queries.square[texts]
    if fused.video is not None:
        video = fused.video[:, texts].clone()  # (videos, texts, dim)
        length, dot = video.norm(dim=-1).clamp_min(1e-12), (video * text).sum(dim=-1)
    else:
        query = text[None] if queries.query is None else queries.query[:, texts]
        A = fused.coefficients(model.fusion, query)
        length = (fused.gram @ A * A).sum(dim=1).clamp_min(1e-24).sqrt()  # |v|        (videos, texts)
        dot = (_products(fused.atoms, text) * A).sum(dim=1)  # t . v
    M = len(noise) if isinstance(noise, Tensor) else noise.M
    if model.radius is None or M == 0:
        return (dot / length / square.clamp_min(1e-24).sqrt()).T
    if fused.video is None:
        shape = (*dot.shape, text.shape[1])
        video = torch.bmm(A.mT, fused.atoms, out=room[0, : dot.numel()].view(shape))  # (videos, texts, dim)
    radius = model.radius.from_similarities(_products(fused.unit, queries.unit[texts]).mT, text, video)
    if isinstance(noise, Expectation):
        return noise.of(text, radius, video).T
    if isinstance(noise, PairNoise):
        eps = noise.block(range(texts.start, texts.stop), range(videos.start, videos.stop), text.shape[1]).to(text).transpose(1, 2)
        best = torch.stack([F.cosine_similarity(text + radius * e, video, dim=-1, eps=1e-12) for e in eps])
        return best.amax(dim=0).T
    dots = torch.addmm(dot.flatten(), noise, video.mul_(radius).flatten(0, 1).T)  # (M, pairs)
    product = room[1, : dot.numel()].view_as(radius)
    squares = (noise @ torch.mul(radius, text, out=product).flatten(0, 1).T).mul_(2)
    squares = squares.addmm_(noise.square(), torch.mul(radius, radius, out=product).flatten(0, 1).T).add_(square.repeat(len(length)))
    best = (dots * squares.clamp_min_(1e-24).rsqrt_()).amax(dim=0)
    return (best.view_as(length) / length).T


def dual_softmax(scores: Float[Tensor, "texts videos"], scale: float) -> Float[Tensor, "texts videos"]:
    """Each score times the softmax of its column (--dsl): texts compete for a video before videos are ranked for a text.

    The released code offers it. It is TRANSDUCTIVE: a score then depends on all test queries at once, which a search engine, asked one
    query at a time, does not have; numbers with it do not compare with numbers without."""
    return scores * (scale * scores).softmax(dim=0)


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


def text_to_video_ranks(scores: Float[Tensor, "texts videos"], owner: Int[Tensor, " texts"]) -> Float[Tensor, " texts"]:
    """The rank of each text's own video, from 1; ties at their expected place."""
    return _ranks(scores, F.one_hot(owner.to(scores.device), scores.shape[1]).bool())


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


COLUMNS = ("R@1", "R@5", "R@10", "R@50", "MdR", "MnR")


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
    from matplotlib.figure import Figure  # not pyplot: its state, and so a notebook's plots, stay as they are
    from matplotlib.patches import Rectangle

    captions = [caption for clip in clips for caption in clip.captions]
    chosen = np.sort(np.random.default_rng(seed).permutation(len(captions))[:queries])
    shown = min(shown, len(clips))
    figure = Figure(figsize=(2.7 * (shown + 1), 1.15 * len(chosen)))
    axes = figure.subplots(len(chosen), shown + 1, squeeze=False, gridspec_kw=dict(width_ratios=[1.15] + [1] * shown, wspace=0.05, hspace=0.18))
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
                axis.add_patch(Rectangle((0, 0), 1, 1, transform=axis.transAxes, fill=False, color="#009e73", linewidth=5))
    for axis in axes.flat:
        axis.axis("off")
    for rank, axis in enumerate(axes[0, 1:], start=1):
        axis.set_title(f"rank {rank}", fontsize=9)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def rank_histogram(path: Path, ranks: Float[Tensor, " texts"], videos: int) -> None:
    """A picture of how the ranks of the captions' own clips are spread, beside what chance would give."""
    from matplotlib.figure import Figure

    edges = np.unique(np.geomspace(1, videos + 1, 25).round())
    counts, _ = np.histogram(ranks.cpu().numpy(), edges)
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.stairs(100 * counts / len(ranks), edges, fill=True, color="#0072b2", label="captions")
    axis.stairs(100 * np.diff(edges) / videos, edges, color="#e69f00", lw=2, label="chance")
    axis.set(xscale="log", xlabel="rank of the caption's own clip", ylabel="% of captions", title=f"{len(ranks)} captions, {videos} clips")
    axis.legend()
    figure.savefig(path, dpi=110)


# -------------------------------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class EvaluationConfig:
    """What to evaluate, and how. What is not given here is taken from the checkpoint."""

    checkpoint: tuple[Path, ...] = ()
    """runs (folders: their best.pt) or checkpoint files; default: the latest run under runs/"""
    M: int = 20
    """texts drawn for each text-video pair ("Inference Pipeline"); 0 scores t itself"""
    score: Literal["sampled", "mean", "expected"] = "sampled"
    """sampled: the best of M draws (the paper); mean: t itself (X-Pool's inference); expected: the expectation of the best of M, no draws"""
    prior: Literal["normal", "uniform"] | None = None
    """eps ~ N(0, prior_std^2) or U(0, 1); default: as in training; a released checkpoint does not say: uniform, but for LSMDC N(0, 0.003^2)"""
    prior_std: float | None = None
    noise: Literal["shared", "independent"] = "shared"
    """shared: one bank of M draws for all pairs; independent: fresh draws for each pair (slow)"""
    protocol: Literal["paper", "released"] = "paper"
    """released: video j pooled by its own caption for every query, as the released evaluator does: it LEAKS; for comparison only"""
    dsl: bool = False
    """dual softmax: transductive, uses all test queries at once"""
    captions: Literal["all", "first", "joined"] = "all"
    """all: every caption is a query; first: one caption a clip; joined: all captions of a clip in one (papers on VATEX differ in this)"""
    seed: int = 0
    """of the noise"""
    split: Literal["test", "val"] = "test"
    """which clips; choices belong to val, the test split to the end"""
    dataset: str | None = None
    """another data set than the run's own; a released checkpoint names none"""
    annotations: Path | None = None
    """for csv: a file of video,caption[,split]"""
    videos: Path | None = None
    """for csv: the folder of video files"""
    data: Path = Path("data")
    """folder of data sets and of the cache of decoded frames"""
    out: Path | None = None
    """folder for what is written; default: each run's own"""
    allow_missing: bool = False
    """score the videos that are there, and say how many; without it, missing or unreadable videos are an error (a smaller gallery flatters)"""
    batch: int = 32
    """clips encoded at once"""
    workers: int = 0
    """processes that load clips ahead"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """autocast of CLIP; auto: bf16 on CUDA, off on the CPU; scores are float32"""


# The smallest and largest values of numbers; others have none.
RANGES: dict[str, tuple[int | float, float]] = {**dict.fromkeys(("M", "prior_std", "seed", "workers"), (0, math.inf)), "batch": (1, math.inf)}


def check_numbers(config, ranges: dict[str, tuple[int | float, float]]) -> None:
    """Raises ModelError for a number of a config that is out of its range."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ModelError(f"--{name.replace('_', '-')} {value}: give a number from {low:g} {f'to {high:g}' if high < math.inf else 'on'}.")


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
    """The model of a run, of a folder of save_pretrained, or of a file; the config it was trained with; and the file. Raises ModelError.

    Released checkpoints hold no config: it is {"released": True} then."""
    names = ("best.pt", "model.safetensors") if path.is_dir() else ("",)
    file = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if not file.is_file():
        raise ModelError(f"{file} not found: train first (python train.py), or name a run or checkpoint by --checkpoint.")
    content = load_file(file)
    return build_from_checkpoint(content, file), {"released": True} if is_released(content) else content.get("config", {}), file


def prior_of(config: EvaluationConfig, trained: dict, dataset: str) -> dict:
    """The noise to draw, for noise_bank: what the flags say, else as the run was trained; released checkpoints: as the released code."""
    released = dict(prior="normal", prior_std=0.003) if dataset == "lsmdc" else dict(prior="uniform")
    own = released if trained.get("released") else trained
    std = own.get("prior_std", 1.0) if config.prior_std is None else config.prior_std
    return dict(prior=config.prior or own.get("prior", "normal"), std=std)


def join_processes(device: str) -> None:
    """Makes this process one of those that torchrun started (NCCL where they use CUDA, each its own GPU; else gloo). Raises ModelError."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    cuda, local = choose_device(device).type == "cuda", int(os.environ["LOCAL_RANK"])
    if cuda and local >= torch.cuda.device_count():
        raise ModelError(f"this machine has {torch.cuda.device_count()} GPUs and torchrun started more processes: lower --nproc-per-node.")
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))  # the first may have clips to decode while others wait


def rank_and_world() -> tuple[int, int]:
    """Which of how many processes this is: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(count: int) -> slice:
    """The part of `count` things that is this process's; the parts of all processes, in their order, are the whole."""
    rank, world = rank_and_world()
    return slice(count * rank // world, count * (rank + 1) // world)


def gather(x: Tensor) -> Tensor:
    """Rows of all processes under torchrun, in the order of ranks; each may hold another number of rows."""
    if not dist.is_initialized():
        return x
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, len(x))
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def readable(clips: list[Clip], cache: FrameCache, store: FeatureCache, allow_missing: bool) -> list[Clip]:
    """The clips whose frames can be had: all, or an error that says which is the first that cannot. Under torchrun each process looks after
    its share. Raises DataError."""
    rank, world = rank_and_world()
    failures = cache.fill([clip for clip in clips[rank::world] if store.load(clip) is None])
    if world > 1:
        everyones: list[dict[str, str]] = [{}] * world
        dist.all_gather_object(everyones, failures)
        failures = {name: reason for found in everyones for name, reason in found.items()}
    if failures and not allow_missing:
        first = next(failures[clip.id] for clip in clips if clip.id in failures)
        raise DataError(f"{len(failures)} of {len(clips)} videos to evaluate on cannot be read, and a smaller gallery flatters the score "
                        f"({first}): mend them, or add --allow-missing.")  # fmt: skip
    left = [clip for clip in clips if clip.id not in failures]
    if not left:
        raise DataError(f"none of the {len(clips)} videos to evaluate on can be read: {next(iter(failures.values()))}")
    return left


@dataclass(frozen=True)
class Opened:
    """A checkpoint, and what is scored with it. Under torchrun `features` hold the frames of this process's share of the videos, and all texts."""

    model: TMASS
    trained: dict  # the config it was trained with
    file: Path
    dataset: str
    clips: list[Clip]
    listed: int  # clips of the split, before those that are missing were left out
    cache: FrameCache
    features: Features


def open_run(config: EvaluationConfig, path: Path) -> Opened:
    """Opens a checkpoint and makes its features of the clips, once for all ways to score them. Raises DataError and ModelError."""
    device = choose_device(config.device)
    model, trained, file = open_checkpoint(path)
    model = model.to(device)
    dataset = config.dataset or trained.get("dataset")
    if dataset is None:
        raise ModelError(f"{file} does not say which data set it is for: name one by --dataset (csv: with --annotations and --videos).")
    sources = [getattr(config, name) or (Path(trained[name]) if trained.get(name) else None) for name in ("annotations", "videos")]
    clips = data.of_split(data.read_clips(dataset, config.data, *sources), config.split)
    if config.captions != "all":
        chosen = {"first": lambda captions: captions[:1], "joined": lambda captions: (" ".join(captions),)}[config.captions]
        clips = [replace(clip, captions=chosen(clip.captions)) for clip in clips]
    if config.protocol == "released" and sum(len(clip.captions) for clip in clips) != len(clips):
        raise ModelError("--protocol released is defined for one caption a video, and some of these have several: add --captions first or joined.")
    cache = FrameCache(data.cache_folder(dataset, config.data, sources[1]), model.arguments["num_frames"], model.resolution)
    store = feature_cache(cache, model)
    listed, clips = len(clips), readable(clips, cache, store, config.allow_missing)
    if (world := rank_and_world()[1]) > len(clips):
        raise ModelError(f"{world} processes for {len(clips)} videos: start fewer.")
    own = share(len(clips))
    features = extract_features(model, clips[own], cache, config.batch, config.workers, config.amp, store)
    features = replace(features, text=gather(features.text), owner=gather(features.owner + own.start))
    return Opened(model, trained, file, dataset, clips, listed, cache, features)


def score_all(config: EvaluationConfig, opened: Opened) -> Float[Tensor, "texts videos"]:
    """The scores of all pairs, as the flags say; under torchrun each process scores its share of the videos and has the whole."""
    features, own = opened.features, share(len(opened.clips))
    M = draws(config, opened)
    prior = prior_of(config, opened.trained, opened.dataset)
    if config.score == "expected":
        noise = Expectation(M, **prior)
    elif config.noise == "independent":
        noise = PairNoise(M, config.seed, **prior, first_video=own.start)
    else:
        noise = noise_bank(M, features.text.shape[1], config.seed, **prior)
    own_text = features.text[own] if config.protocol == "released" else None
    progress = rank_and_world()[0] == 0
    return gather(scores(opened.model, features.text, features.frames, noise, own_text=own_text, progress=progress).T.contiguous()).T


def draws(config: EvaluationConfig, opened: Opened) -> int:
    """M, 0 where t itself is scored."""
    return config.M if opened.model.radius is not None and config.score != "mean" else 0


def evaluate(config: EvaluationConfig, path: Path) -> dict:
    """Evaluates one checkpoint; writes results.json, ranks.png and retrieved.png (with -LEAKS in their names under
    --protocol released); returns what results.json holds, and "failure": a sentence where they could not be written.

    Under torchrun each process encodes and scores its share of the videos; the first one writes."""
    started = time.time()
    rank, world = rank_and_world()
    opened = open_run(config, path)
    model, trained, file, clips, listed = opened.model, opened.trained, opened.file, opened.clips, opened.listed
    device, owner, dataset = model.logit_scale.device, opened.features.owner, opened.dataset
    seconds_features, started = time.time() - started, time.time()
    M, prior = draws(config, opened), prior_of(config, trained, dataset)
    matrix = score_all(config, opened)
    metrics = retrieval_metrics(matrix, owner)
    if config.dsl:
        scale = model.logit_scale.exp().item()
        both = dual_softmax(matrix, scale), dual_softmax(matrix.T, scale).T
        metrics = {name: retrieval_metrics(m, owner)[name] for name, m in zip(("t2v", "v2t"), both)}
    seconds = {"features": round(seconds_features, 2), "scores": round(time.time() - started, 2)}
    about = ", R of t and v" * (model.arguments["radius"] == "joint" and model.radius is not None) + (f", M = {M}" if M else "")
    if M and (config.prior or config.prior_std is not None or trained.get("released")):
        about += ", U(0, 1)" if prior["prior"] == "uniform" else f", N(0, {prior['std']:g}^2)"
    about += ", expected" if M and config.score == "expected" else ", independent noise" if M and config.noise == "independent" else ""
    about += (", DSL (transductive)" if config.dsl else "") + (", LEAKS" if config.protocol == "released" else "")
    about += f", {len(clips)} of {listed} videos" if len(clips) < listed else ""
    result = {
        "name": METHODS[model.arguments["method"]] + about,
        "checkpoint": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "method": model.arguments["method"],
        "dataset": dataset,
        "split": config.split,
        "texts": len(owner),
        "videos": len(clips),
        "missing": listed - len(clips),
        "M": M,
        "prior": prior,
        "seed": config.seed,
        "metrics": metrics,
        "seconds": seconds,
        "machine": f"{platform.machine()}, {world} processes, {torch.get_num_threads()} threads, {device.type}, torch {torch.__version__}",
        "config": {name: value if isinstance(value, int | str) else str(value) for name, value in asdict(config).items()},
        "trained": trained,
    }
    out = config.out / file.parent.name if config.out else file.parent
    mark = "-LEAKS" if config.protocol == "released" else ""  # honest results are not overwritten by others
    failure = ""
    if rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"results{mark}.json").write_text(json.dumps(result, indent=2) + "\n")
            rank_histogram(out / f"ranks{mark}.png", text_to_video_ranks(matrix, owner), len(clips))
            contact_sheet(out / f"retrieved{mark}.png", matrix.cpu(), owner.cpu(), clips, opened.cache)
        except DataError as error:  # kept features may have outlived videos and frames
            print(f"no retrieved.png: {error}", file=sys.stderr)
        except OSError as error:
            failure = f"{out} could not be written ({error.strerror or error}): make room there, or name another folder by --out."
    return {**result, "written": f"{out}/results{mark}.json, ranks{mark}.png, retrieved{mark}.png", "failure": failure}


METHODS = {"clip": "mean pooling", "xpool": "X-Pool", "tmass": "T-MASS"}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Anything wrong with the input ends it with one sentence and exit code 1."""
    import tyro

    config = tyro.cli(EvaluationConfig, args=arguments, description=__doc__)
    try:
        check_numbers(config, RANGES)
        join_processes(config.device)
        results = [evaluate(config, path) for path in config.checkpoint or (latest_run(),)]
    except (DataError, ModelError) as error:
        sys.exit(f"error: {error}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        rows = {}
        for result in results:
            name = result["name"]
            rows[name if name not in rows else f"{name} ({result['checkpoint']})"] = result["metrics"]
        r = results[0]
        how = "every pair scored without its pairing" if config.protocol == "paper" else "THE PAIRING LEAKS INTO THE SCORES"
        chance = f"chance: R@10 {min(100, 1000 / r['videos']):.1f}, MdR {(r['videos'] + 1) / 2:g}"
        print(f"{r['dataset']}, {r['split']} split: {r['texts']} captions x {r['videos']} videos, {how}; {chance}\n")
        print(table(rows))
        print("\n" + "\n".join(f"written: {result['written']}" for result in results if not result["failure"]))
    if dist.is_initialized():
        dist.destroy_process_group()
    if failures := [result["failure"] for result in results if result["failure"]]:
        sys.exit(f"error: {failures[0]}")


if __name__ == "__main__":
    main()
