"""Scores of every text with every video ("Inference Pipeline"): the best of M draws, exact and fast.

The equation itself is `evaluate.scores_literal`; `scores` computes the same numbers in bounded memory. A
score is made of one text and one video, and of nothing else. Copy this file with model.py and losses.py: the
three need torch, numpy and jaxtyping.
"""

import contextlib
import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from losses import cosine_scores
from model import (
    TMASS,
    JointRadius,
    LinearRadius,
    MeanPool,
    Pairs,
    Radius,
    Text,
    XPool,
    sample_noise,
    stochastic_text,
)

# ------------------------------------------------------------------------------------------------ noise


def noise_bank(
    M: int, dim: int, seed: int, prior: str = "normal", std: float = 1.0
) -> Float[Tensor, "M dim"]:
    """eps_1 .. eps_M, drawn once and shared by all pairs (--noise shared); the same on every device.

    prior "normal": N(0, std^2), the paper's with std = 1; "uniform": U(0, 1), the released code's default."""
    return sample_noise(M, dim, prior=prior, std=std, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class PairNoise:
    """Independent draws for each pair (--noise independent). They follow from seed, text i and video j alone,
    so they do not depend on blocks or ranks. Slow: a random number for each pair, draw and channel."""

    M: int
    seed: int = 0
    prior: str = "normal"
    std: float = 1.0
    first_video: int = 0  # the number of the first column, where a rank holds a shard of the videos

    def block(self, texts: Sequence[int], videos: Sequence[int], dim: int) -> Float[Tensor, "M *pairs dim"]:
        """eps of every pair of the given texts and videos, by their numbers."""
        pairs = [np.random.SeedSequence([self.seed, i, self.first_video + j]) for i in texts for j in videos]
        seeds = [int(pair.generate_state(1, np.uint64)[0]) & 2**63 - 1 for pair in pairs]
        draws = [noise_bank(self.M, dim, seed, self.prior, self.std) for seed in seeds]
        return torch.stack(draws, dim=1).unflatten(1, (len(texts), len(videos)))


@dataclass(frozen=True)
class MonteCarlo:
    """The expected best of M draws, estimated (--score mc): the mean over banks of the best of M draws.

    All pairs share the banks. It holds for every psi, R and prior. With error=True it gives the standard
    errors of the scores instead: the standard deviation over banks / sqrt(banks)."""

    M: int
    banks: int = 50
    seed: int = 0
    prior: str = "normal"
    std: float = 1.0
    error: bool = False

    def draws(self, dim: int) -> Float[Tensor, "draws dim"]:
        """eps of all banks, one after the other: (banks M, dim)."""
        return noise_bank(self.M * self.banks, dim, self.seed, self.prior, self.std)

    def reduce(self, best: Float[Tensor, "banks *pairs"]) -> Float[Tensor, "*pairs"]:
        """The mean over banks of the best draw, or its standard error (NaN with one bank)."""
        return best.std(dim=0) / self.banks**0.5 if self.error else best.mean(dim=0)


@dataclass(frozen=True)
class Expectation:
    """The expected best of M draws from N(0, std^2), by exact moments (--score expected).

    A score is c = X / (|v| sqrt N) with X = t_s . v, N = |t_s|^2. Its moments are one-dimensional integrals
        E c^k = |v|^-k / Gamma(k / 2)  integral over u > 0 of  u^(k/2 - 1) E[X^k exp(-u N)]
    in which every expectation is known. With a = 1 / (1 + 2 u std^2 R^2), a channel at a time,
        E exp(-u N) = prod sqrt(a) exp(-u a t^2) =: phi,   and under that weight X is normal with
        m = sum v t a,  w = std^2 sum v^2 R^2 a,   so E[X exp(-u N)] = phi m,  E[X^2 ..] = phi (m^2 + w),
    E[X^3 ..] = phi (m^3 + 3 m w), E[X^4 ..] = phi (m^4 + 6 m^2 w + 3 w^2). The points are
    u = exp(z - exp(-z)) / E N, equally spaced in z. The best of M follows from mean, standard deviation,
    skewness g and excess h by the expansion of Cornish and Fisher. With z_k, the expected k-th power of the
    largest of M normals, it is
        mean + std (z_1 + g (z_2 - 1) / 6 + h (z_3 - 3 z_1) / 24 - g^2 (2 z_3 - 5 z_1) / 36).
    The moments are exact, whatever R is. The largest error of the best of 20 against 10^5 draws, in standard
    deviations of a draw, is 0.02 where log R spreads by up to 0.5 over channels, 0.19 up to 1.5 and 0.25 at 2
    (benchmarks/expectation.py). It costs as much as some 2,000 draws."""

    M: int
    prior: str = "normal"
    std: float = 1.0

    NODES = 40

    def of(self, text: Tensor, radius: Tensor, video: Tensor) -> Tensor:
        """The expected best score of each pair. Sums over the last axis, the channels. Raises ValueError for
        U(0, 1), which has no such form."""
        if self.prior != "normal":
            raise ValueError("the exact moments need the normal prior; use Delta or MonteCarlo for U(0, 1).")
        dtype, (text, radius, video) = text.dtype, (x.double() for x in (text, radius, video))  # cancellation
        r2, t2, tv, v2 = self.std**2 * radius.square(), text.square(), text * video, video.square()
        scale = (t2 + r2).sum(-1).clamp_min(1e-24)  # E N
        r2, t2 = r2 / scale[..., None], t2 / scale[..., None]
        z = torch.linspace(-4.5, 7.0, self.NODES, dtype=torch.float64)
        us = (z - torch.exp(-z)).exp()
        raw = [torch.zeros_like(scale) for _ in range(4)]  # E c^k |v|^k, k = 1 .. 4
        for u, du in zip(us.tolist(), ((z[1] - z[0]) * us * (1 + torch.exp(-z))).tolist()):
            a = 1 / (1 + 2 * u * r2)
            phi = (0.5 * a.log().sum(-1) - u * (t2 * a).sum(-1)).exp() * du
            m, w = (tv * a).sum(-1) / scale.sqrt(), (v2 * r2 * a).sum(-1)
            powers = m, m**2 + w, m**3 + 3 * m * w, m**4 + 6 * m**2 * w + 3 * w**2
            for k, power in enumerate(powers, start=1):
                raw[k - 1] += phi * power * (u ** (k / 2 - 1) / math.gamma(k / 2))
        length = video.norm(dim=-1).clamp_min(1e-12)
        m1, m2, m3, m4 = (moment / length**k for k, moment in enumerate(raw, start=1))
        std = (m2 - m1**2).clamp_min(1e-16).sqrt()
        g = ((m3 - 3 * m1 * m2 + 2 * m1**3) / std**3).clamp(-2, 2)
        h = ((m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / std**4 - 3).clamp(-2, 6)
        z1, z2, z3 = (best_of(self.M, power) for power in (1, 2, 3))
        best = z1 + g * (z2 - 1) / 6 + h * (z3 - 3 * z1) / 24 - g**2 * (2 * z3 - 5 * z1) / 36
        return (m1 + std * best).to(dtype)


@dataclass(frozen=True)
class Delta:
    """An approximation of the expected best of M draws, in closed form (--score delta, --pairs delta).

    eps has independent channels of mean mu, variance s^2. With t' = t + mu R, X = t_s . v, N = |t_s|^2:
        E X = t' . v =: x          E N = |t'|^2 + s^2 |R|^2 =: n
    With A = sum R^2 v^2, B = sum R^2 v t', C = sum R^2 t'^2 (sums over channels), the delta method gives for
    the cosine X / (|v| sqrt N)
        mean = (x / n^(1/2) - s^2 B / n^(3/2) + 3/2 s^2 x C / n^(5/2)) / |v|          (second order)
        var  = s^2 (A - 2 (x / n) B + (x / n)^2 C) / (n |v|^2)                        (first order)
    and the best of M is taken at mean + c_M sqrt(var), c_M the expected largest of M standard normals
    (c_1 = 0, c_20 = 1.867). It holds where R is small and nearly even over channels: its largest error, in
    standard deviations of a draw, is 0.2 where log R spreads by 0.2, 0.7 at 0.7 and 1.8 at 1.5. A model that
    trains with it (--recipe best) learns uneven R: read it there as a score of its own, no expectation."""

    M: int
    prior: str = "normal"
    std: float = 1.0

    def of(self, text: Tensor, radius: Tensor, video: Tensor) -> Tensor:
        """The score of each pair. Sums over the last axis, the channels."""
        mu, s2 = self.moments
        t = text + mu * radius if mu else text
        r2 = radius.square()
        x = (t * video).sum(-1)
        n = (t.square().sum(-1) + s2 * r2.sum(-1)).clamp_min(1e-24)
        r2v, r2t = r2 * video, r2 * t
        A, B, C = (r2v * video).sum(-1), (r2v * t).sum(-1), (r2t * t).sum(-1)
        return self.from_sums(x, n, A, B, C) / video.norm(dim=-1).clamp_min(1e-12)

    @property
    def moments(self) -> tuple[float, float]:
        """mu and s^2 of eps."""
        return (0.5, 1 / 12) if self.prior == "uniform" else (0.0, self.std**2)

    def from_sums(self, x: Tensor, n: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """The score times |v|, of the sums over channels that the class names."""
        _, s2 = self.moments
        mean = (x - s2 * B / n + 1.5 * s2 * (x / n) * (C / n)) / n.sqrt()  # n n would overflow
        variance = s2 * (A - 2 * (x / n) * B + (x / n).square() * C) / n
        return mean + best_of(self.M) * variance.clamp_min(1e-20).sqrt()


@functools.cache
def best_of(M: int, power: int = 1) -> float:
    """c_M: the expected largest of M standard normals, the integral of x d(Phi(x)^M); or of its power."""
    x = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    density = torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
    return torch.trapezoid(x**power * M * torch.special.ndtr(x) ** (M - 1) * density, x).item()


# M shared draws, own draws for each pair, or one of the three expected bests
Noise = Float[Tensor, "M dim"] | PairNoise | MonteCarlo | Expectation | Delta


# ------------------------------------------------------------------------------------------------ scores


@torch.no_grad()
def scores(
    model: TMASS,
    text: Float[Tensor, "texts dim"],
    frames: Float[Tensor, "videos frames dim"],
    noise: Noise,
    block: int | None = None,
    own_text: Float[Tensor, "videos dim"] | None = None,
    progress: bool = False,
) -> Float[Tensor, "texts videos"]:
    """The score of every pair, in blocks of about `block` pairs (default: `default_block`). Dropout is off.

    Memory is that of a block: it grows neither with texts x videos x dim nor with M. MeanPool, XPool, also
    with a `change` of its v (engine/controls.py), and every Radius have a fast form (`_Fast`). Another psi or
    R is scored as the paper writes it, block by block, and a warning says so. Each call compares the fast
    scores with the literal ones on a few pairs: if they differ, because model.py was changed, the literal
    ones are used, and a warning says so. A score whose R is too large for the dtype is NaN, with a warning:
    in float32 from about e^40 on; for the expected best with U(0, 1), e^20. Float16 texts: ValueError.
    frames    may have another dtype than text (a float16 memory map): each block is converted by itself
    own_text  the released protocol, which LEAKS: video j is pooled by own_text[j], its own caption"""
    if text.dtype == torch.float16:
        raise ValueError("texts of float16 cannot be scored, because |t_s|^2 overflows: give text.float().")
    noise = noise.to(text) if isinstance(noise, Tensor) else noise
    pairs = block or default_block(text.shape[1], text.device)
    if isinstance(noise, PairNoise):
        pairs = max(1, pairs // max(1, noise.M))
    if isinstance(noise, MonteCarlo):
        pairs = max(1, pairs * text.shape[1] // (text.shape[1] + noise.M * noise.banks))
    task = _Task(model, text, frames, noise, own_text)
    with _eval_mode(model):
        if slow := task.without_fast_form():
            warnings.warn(
                f"{slow} has no fast form (engine/scoring.py): its scores take longer.", stacklevel=2
            )
            return _warn_of_nan(task.in_blocks(pairs, task.literal, progress))
        found = _warn_of_nan(task.in_blocks(pairs, _Fast(task, pairs).prepare, progress))
        few = [[*{0, count // 2, count - 1}] for count in found.shape]
        difference = (found[few[0]][:, few[1]] - task.literal_block(*few)).abs()
        if (difference > _tolerance(text)).any():
            message = f"fast and literal scores differ by {difference.max():.1e}: the literal ones are used. "
            warnings.warn(message + "After a change of model.py, change engine/scoring.py too.", stacklevel=2)
            return task.in_blocks(pairs, task.literal, progress)
    return found


def _warn_of_nan(found: Tensor) -> Tensor:
    """The scores as they are. A warning says how many are NaN or infinite."""
    if bad := sum(int((~rows.isfinite()).sum()) for rows in found.split(512)):  # the memory of some rows
        why = f"R is too large for {found.dtype}, or the features are not finite"
        warnings.warn(f"{bad} of {found.numel()} scores are NaN or infinite: {why}.", stacklevel=3)
    return found


def no_overflow(radius: Float[Tensor, "*pairs dim"]) -> Float[Tensor, "*pairs"]:
    """0 for each pair; NaN where |t_s|^2 may overflow (eps is hardly above 5), and a cosine be 0."""
    return 0 * (50 * radius.square().sum(dim=-1))


def default_block(dim: int, device: torch.device) -> int:
    """Pairs a block: two tensors (pairs, dim) take 20 MiB on a CPU, 1/16 of a GPU's free memory. With
    JointRadius it has three."""
    memory = torch.cuda.mem_get_info(device)[0] // 16 if device.type == "cuda" else 5 * 2**22
    return max(256, memory // (2 * 4 * dim))


def _tolerance(text: Tensor) -> float:
    """How far rounding can move a fast score, which is a cosine, away from the literal one."""
    exact = torch.get_float32_matmul_precision() == "highest"  # else products may be TF32 or bfloat16
    return {torch.float64: 1e-8, torch.float32: 1e-4 if exact else 3e-2}.get(text.dtype, 3e-2)


@contextlib.contextmanager
def _eval_mode(model: TMASS) -> Iterator[None]:
    """Turns dropout of psi and R off within the block."""
    modes = [(part, part.training) for part in (model.fusion, model.radius) if part is not None]
    try:
        for part, _ in modes:
            part.eval()
        yield
    finally:
        for part, training in modes:
            part.train(training)


_pool = threading.Lock()  # one call at a time has threads


def in_threads(function: Callable[[int], None], items: Sequence[int]) -> Iterator[None]:
    """Calls the function for each item, in as many threads as torch has, each with one thread of OpenMP.

    They need not wait for each other after each product, which other processes on the cores would delay."""
    threads, mode = min(torch.get_num_threads(), len(items)), torch.is_inference_mode_enabled()
    if threads < 2 or not _pool.acquire(blocking=False):
        yield from map(function, items)
        return

    def call(item: int) -> None:  # the modes are those of a thread
        with torch.inference_mode(mode), torch.no_grad():
            function(item)

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread; a new one would start with as many as there are cores
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(call, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
        _pool.release()


@dataclass(frozen=True)
class _Task:
    """What is to be scored, and the literal form: max_m cos(t + R eps_m, v), as the paper writes it."""

    model: TMASS
    text: Tensor
    frames: Tensor
    noise: Noise
    own_text: Tensor | None

    @property
    def draws(self) -> int:
        """M, or 0 without a mass."""
        if self.model.radius is None:
            return 0
        return len(self.noise) if isinstance(self.noise, Tensor) else self.noise.M

    @property
    def change(self) -> Callable[[Text, Tensor, Pairs], Pairs] | None:
        """What psi does to X-Pool's v of a pair (engine/controls.py); None for every other psi."""
        psi = self.model.fusion
        known = isinstance(psi, XPool) and self.model.radius is None and self.own_text is None
        return getattr(psi, "change", None) if known else None

    def without_fast_form(self) -> str:
        """The class of the psi or R that can only be scored literally, or ""."""
        psi, radius = self.model.fusion, self.model.radius
        if self.own_text is None and type(psi) not in (MeanPool, XPool) and self.change is None:
            return type(psi).__name__
        for method in ("forward", "from_similarities") if radius is not None else ():
            if getattr(type(radius), method, None) is not getattr(Radius, method):
                return type(radius).__name__  # it does more than exp(exponent)
        return ""

    def in_blocks(self, pairs: int, prepare: Callable[[range], Callable], progress: bool) -> Tensor:
        """All scores, (texts, videos). prepare(videos) gives the function that scores texts with these."""
        texts, videos = len(self.text), len(self.frames)
        # The frames of a block take no more than its two tensors, and on a CPU each thread has some videos.
        part = videos if self.text.is_cuda else -(-videos // torch.get_num_threads())
        most = min(part, 2 * pairs // self.frames.shape[1])
        columns = max(1, min(most, max(int(pairs**0.5), pairs // max(1, texts))))
        rows = max(1, pairs // columns)
        out, starts = self.text.new_empty(texts, videos), range(0, videos, columns)

        def score_column(v: int) -> None:
            score = prepare(range(v, min(v + columns, videos)))
            for t in range(0, texts, rows):
                some = range(t, min(t + rows, texts))
                out[t : some.stop, v : v + columns] = score(some)

        done = in_threads(score_column, starts) if out.device.type == "cpu" else map(score_column, starts)
        if progress and texts * videos > 10**6:
            from tqdm.auto import tqdm

            done = tqdm(done, desc="scores", leave=False, total=len(starts))
        list(done)
        return out

    def literal(self, videos: range) -> Callable[[range], Tensor]:
        """The function that scores texts with these videos as the paper writes it."""
        return lambda texts: self.literal_block(texts, videos)

    def literal_block(self, texts: Sequence[int], videos: Sequence[int]) -> Float[Tensor, "texts videos"]:
        """The scores of some texts with some videos; one draw is in memory at a time."""
        t, f = self.text[list(texts)], self.frames[list(videos)].to(self.text)
        if self.own_text is None:
            video = self.model.fusion(t, f)  # v = psi(t, f)
        else:
            video = self.pooled_by_own_text(videos).expand(len(t), -1, -1)
        if self.draws == 0:
            return cosine_scores(t, video)
        radius = self.model.radius(t, f, video)  # R
        if isinstance(self.noise, Expectation | Delta):
            return self.noise.of(t[:, None], radius, video)
        if isinstance(self.noise, MonteCarlo):
            banks = self.bank.split(self.noise.M)
            best = self.noise.reduce(torch.stack([_best(t, radius, video, bank.split(1)) for bank in banks]))
        else:
            own = isinstance(self.noise, PairNoise)
            best = _best(t, radius, video, self.own_draws(texts, videos) if own else self.noise.split(1))
        return best + no_overflow(radius)

    @functools.cached_property
    def bank(self) -> Float[Tensor, "draws dim"]:
        """The shared draws, of all banks for MonteCarlo."""
        if isinstance(self.noise, MonteCarlo):
            return self.noise.draws(self.text.shape[1]).to(self.text)
        return self.noise

    def own_draws(self, texts: Sequence[int], videos: Sequence[int]) -> Sequence[Tensor]:
        """PairNoise's eps of these pairs: M tensors (1, texts, videos, dim)."""
        return self.noise.block(texts, videos, self.text.shape[1]).to(self.text).split(1)

    def pooled_by_own_text(self, videos: Sequence[int]) -> Float[Tensor, "videos dim"]:
        """v[j, j]: each video pooled by its own caption (the released protocol, which leaks)."""
        pairs = ((self.own_text[j, None], self.frames[j, None].to(self.text)) for j in videos)
        return torch.stack([self.model.fusion(t, f)[0, 0] for t, f in pairs])


def _best(text: Text, radius: Pairs, video: Pairs, draws: Sequence[Tensor]) -> Tensor:
    """max_m cos(t + R eps_m, v), (texts, videos)."""
    best = torch.full(video.shape[:2], -torch.inf, dtype=text.dtype, device=text.device)
    for eps in draws:
        t_s = stochastic_text(text, radius, eps)[0]  # t_s = t + R eps
        best = torch.maximum(best, cosine_scores(t_s, video))
    return best


# ------------------------------------------------------------------------------------------ the fast form


class _Fast:
    """The same scores with fewer matrix products; docs/inference.md derives them step by step.

    psi: after the attention, v is linear in the weights a, except for the scales of two LayerNorms. With u_k
    the value of frame k:
        y_k = W_o u_k + b_o,  centred over channels          (sum_k a_k = 1 folds the bias in)
        o   = gamma2 sum_k a_k y_k / sigma + beta2           sigma^2 = a' G a + eps,  G = Y Y' / dim: LN2
        x   = sum_k (a_k / sigma) z_k + c                    z_k = (I + P) gamma2 y_k,  c = (I + P) beta2 + p
        v   = gamma3 x / delta + beta3 = sum_k A_k atom_k    delta^2 = |x|^2 / dim + eps: LN3, z, c centred
    So v is one product of T' + 2 coefficients a pair with T' + 2 atoms a video; v . t and |v| come from them,
    too. Heads are more k. With E the noise bank (M, dim), three products give all draws:
        t_s . v = t . v + (R v) E',         |t_s|^2 = |t|^2 + 2 (R t) E' + (R R) (E E)'"""

    def __init__(self, task: _Task, pairs: int):
        psi, text = task.model.fusion, task.text
        self.task, self.query = task, None
        self.unit, self.square = F.normalize(text, dim=-1), text.square().sum(-1)  # of the texts
        if task.own_text is None and isinstance(psi, XPool):  # W_q LN1(t) / sqrt(dim / heads)
            query = psi.query(psi.norm1(text)).unflatten(-1, (psi.heads, -1)).transpose(0, 1)
            query = query / query.shape[-1] ** 0.5  # (heads, texts, dim / heads)
            # products of dim^2: pooling has 3 a pair, atoms have 2 for each frame and head
            self.few = 3 * len(text) < 2 * psi.heads * task.frames.shape[1]
            if self.few or psi.heads == 1:  # W_k' q: (heads, texts, dim)
                query = query @ psi.key.weight.unflatten(0, (psi.heads, -1))
            self.query, self.folded = query, None if self.few else _folded(psi)
        self.pairs, self.memory = pairs, threading.local()
        radius = task.model.radius if task.draws else None
        self.joint = type(radius) is JointRadius  # and no subclass
        if type(radius) in (LinearRadius, JointRadius):  # S W + b = [S 1] [W; b]
            self.affine = torch.cat([radius.linear.weight.T, radius.linear.bias[None]])
        if self.joint:  # W_t t' + b, and t' has length sqrt(dim)
            self.hidden = radius.text(self.unit * text.shape[1] ** 0.5)

    def prepare(self, videos: range) -> Callable[[range], Tensor]:
        """The function that scores texts with these videos."""
        task = self.task
        frames = task.frames[videos.start : videos.stop].to(task.text)
        if self.query is None:
            constant = isinstance(task.model.fusion, MeanPool) and task.own_text is None
            v = F.normalize(frames, dim=-1).mean(dim=1) if constant else task.pooled_by_own_text(videos)
            fused = _Atoms(v[:, None])
        else:
            fused = None if self.few else _Atoms.of(task.model.fusion, frames, *self.folded)
        video = _pool_then_project(task.model.fusion, self.query, frames) if fused is None else None
        moved = fused.atoms @ task.model.radius.video.weight.T if self.joint and fused else None
        unit = F.normalize(frames, dim=-1)
        return functools.partial(self.block, (videos, frames, unit, fused, moved, video))

    def block(self, prepared: tuple, texts: range) -> Float[Tensor, "texts videos"]:
        """The scores of a block. Tensors of pairs are (videos, texts, ...) here."""
        videos, frames, unit, fused, moved, video = prepared  # moved: W_v of the atoms
        model, noise, some = self.task.model, self.task.noise, slice(texts.start, texts.stop)
        text, square = self.task.text[some], self.square[some]
        shape = len(videos), len(texts), text.shape[1]
        if not hasattr(self.memory, "block"):  # of each thread: v, R v, R t; R, R R; inner of R joint
            self.memory.block = text.new_empty(2 + self.joint, self.pairs, shape[2])
        first, second, *more = (x[: shape[0] * shape[1]].view(shape) for x in self.memory.block)
        if fused is None:
            video = first.copy_(video[:, some])
            length, dot = video.norm(dim=-1).clamp_min(1e-12), (video * text).sum(dim=-1)
        else:
            A = fused.coefficients(text[None] if self.query is None else self.query[:, some])
            length = (fused.gram @ A * A).sum(dim=1).clamp_min(1e-24).sqrt()  # |v|        (videos, texts)
            dot = (_products(fused.atoms, text) * A).sum(dim=1)  # t . v
        change = self.task.change
        if self.task.draws == 0 and change is None:
            return (dot / length / square.clamp_min(1e-24).sqrt()).T
        if fused is not None:
            video = torch.bmm(A.mT, fused.atoms, out=first)
        if change is not None:
            return cosine_scores(text, change(text, frames, video.transpose(0, 1)))
        sims = _products(unit, self.unit[some]).mT  # S        (videos, texts, frames)
        if moved is not None or type(model.radius) is LinearRadius:
            e = torch.mm(F.pad(sims, (0, 1), value=1.0).flatten(0, 1), self.affine, out=second.flatten(0, 1))
            if moved is not None:
                self.add_joint(e, more[0], moved, A, length, self.hidden[some])
            radius = second.exp_()
        else:
            e = model.radius.exponent(sims, text, video)  # log R, (videos, texts, dim) or (videos, texts, 1)
            radius = torch.exp(e, out=second if e.shape == video.shape else None).expand_as(video)
        if isinstance(noise, Expectation | Delta):
            return noise.of(text, radius, video).T
        if isinstance(noise, PairNoise):
            draws = (text + radius * eps[0].transpose(0, 1) for eps in self.task.own_draws(texts, videos))
            best = [F.cosine_similarity(t_s, video, dim=-1, eps=1e-12) for t_s in draws]
            return (torch.stack(best).amax(dim=0) + no_overflow(radius)).T
        bank = self.task.bank.T
        dots = torch.addmm(dot.reshape(-1, 1), video.mul_(radius).flatten(0, 1), bank)  # t_s . v  (pairs, M)
        if len(videos) < 32 or self.task.draws > 64:
            squares = square.expand_as(length).reshape(-1, 1)  # |t_s|^2
            squares = squares.addmm(torch.mul(radius, text, out=first).flatten(0, 1), bank, alpha=2)
        else:  # (R t) E' is R (t E)': no pass over R t, but a product for each text
            drawn = (text[:, None] * bank.T).mT  # t E, (texts, dim, M)
            squares = torch.baddbmm(square[:, None, None], radius.transpose(0, 1), drawn, alpha=2)
            squares = squares.transpose(0, 1).flatten(0, 1)
        squares.addmm_(torch.mul(radius, radius, out=second).flatten(0, 1), bank.square())
        length = length + (squares @ torch.zeros_like(squares[0])).view_as(length)  # NaN if infinite
        cosines = dots.mul_(squares.clamp_min_(1e-24).rsqrt_())
        if isinstance(self.task.noise, MonteCarlo):
            banks = cosines.unflatten(1, (-1, self.task.noise.M)).amax(dim=2).T / length.flatten()
            return self.task.noise.reduce(banks).view_as(length).T
        return (cosines.amax(dim=1).view_as(length) / length).T

    def add_joint(self, e: Tensor, out: Tensor, moved: Tensor, A: Tensor, length: Tensor, hidden: Tensor):
        """Adds what JointRadius has beside S W + b: W_o gelu(W_t t' + W_v v'), v' = sqrt(dim) v / |v|."""
        radius, dim = self.task.model.radius, hidden.shape[1]
        scaled = (A * (dim**0.5 / length)[:, None]).mT
        inner = torch.baddbmm(hidden.expand(len(A), -1, -1), scaled, moved, out=out)
        e.addmm_(torch.ops.aten.gelu_(inner).flatten(0, 1), radius.out.weight.T)


@dataclass(frozen=True)
class _Atoms:
    """The atoms of a block of videos; k is heads x frames. If v ignores the text, it is the only atom."""

    atoms: Tensor  #                                    (videos, k + 2, dim), or (videos, 1, dim)
    key: Tensor | None = None  # LN1(f), or with several heads W_k LN1(f)   (heads, videos, frames, ...)
    gram2: Tensor | None = None  # G of LN2 + eps       (videos, k, k)
    gram3: Tensor | None = None  # G of LN3 + eps       (videos, k + 1, k + 1)

    @functools.cached_property
    def gram(self) -> Tensor:
        """Inner products of a video's atoms, for |v|."""
        return self.atoms @ self.atoms.mT

    @classmethod
    def of(cls, psi: XPool, frames: Tensor, W: Tensor, b: Tensor, Z: Tensor) -> "_Atoms":
        """The atoms of psi, by the matrices of _folded; see _Fast."""
        videos, _, dim = frames.shape
        normed = psi.norm1(frames)
        key = normed[None]
        if psi.heads > 1:
            key = psi.key(normed).unflatten(-1, (psi.heads, -1)).permute(2, 0, 1, 3).contiguous()
        y = F.linear(normed, W, b).unflatten(-1, (psi.heads, dim)).transpose(1, 2).flatten(1, 2)
        c = psi.norm2.bias + psi.linear(psi.norm2.bias)
        z = torch.cat([F.linear(y, Z), (c - c.mean()).expand(videos, 1, dim)], dim=1)
        atoms = torch.cat([z * psi.norm3.weight, psi.norm3.bias.expand(videos, 1, dim)], dim=1)
        gram2, gram3 = y @ y.mT / dim, z @ z.mT / dim
        gram2 += psi.norm2.eps / psi.heads**2  # the weights of a head sum to one; that of z's last row is one
        gram3[:, -1, -1] += psi.norm3.eps
        return cls(atoms, key, gram2, gram3)

    def coefficients(self, query: Tensor) -> Tensor:
        """A, (videos, k + 2, texts), of every pair with the given queries (heads, texts, dim / heads)."""
        if self.key is None:
            return self.atoms.new_ones(len(self.atoms), 1, query.shape[1])
        a = torch.cat([_products(k, q).softmax(dim=1) for k, q in zip(self.key, query)], dim=1)
        w = F.pad(a * (self.gram2 @ a * a).sum(dim=1, keepdim=True).rsqrt(), (0, 0, 0, 1), value=1.0)
        return F.pad(w * (self.gram3 @ w * w).sum(dim=1, keepdim=True).rsqrt(), (0, 0, 0, 1), value=1.0)


def _folded(psi: XPool) -> tuple[Tensor, Tensor, Tensor]:
    """W_o W_v of each head (heads x dim, dim), its bias, (I + P) gamma2: all centred over their output."""
    out, value = psi.out.weight.unflatten(1, (psi.heads, -1)), psi.value.weight.unflatten(0, (psi.heads, -1))
    W, b = torch.einsum("dhe,hex->hdx", out, value), psi.out(psi.value.bias) / psi.heads
    Z = torch.diag(psi.norm2.weight) + psi.linear.weight * psi.norm2.weight
    W = W - W.mean(dim=1, keepdim=True)
    return W.flatten(0, 1), (b - b.mean()).repeat(psi.heads), Z - Z.mean(dim=0)


def _products(y: Tensor, x: Tensor) -> Tensor:
    """Inner products of vectors (videos, k, dim) with all texts (texts, dim): (videos, k, texts)."""
    return (y.flatten(0, 1) @ x.T).unflatten(0, y.shape[:2])


def _pool_then_project(psi: XPool, query: Tensor, frames: Tensor) -> Float[Tensor, "videos texts dim"]:
    """v for few texts, of W_k' q: W_k is on the query's side, W_v behind the pooling, none on the frames."""
    normed = psi.norm1(frames)
    a = torch.einsum("htd,vfd->vhtf", query, normed).softmax(dim=-1)
    pooled = a @ normed[:, None]  # (videos, heads, texts, dim)
    value = torch.einsum("vhtd,hed->vthe", pooled, psi.value.weight.unflatten(0, (psi.heads, -1)))
    o = psi.norm2(psi.out(value.flatten(-2) + psi.value.bias))
    return psi.norm3(o + psi.linear(o))
