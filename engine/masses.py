"""Other masses, tried in the search for one that helps (`reproduce.py --table masses`); none is the paper's.

The radii (RADII) are in units of the text: with R = |t| / sqrt(dim) a draw's noise is as long as t.

    relative      R = |t| / sqrt(dim) exp(S W + b)
    bounded       R = r |t| / sqrt(dim) exp(tanh(e) / 2)      e: the exponent of JointRadius; r is learned
    two-masses    cos(t, v) - (s exp(g_t) + s exp(g_v)) / 2 + s       a psi (FUSIONS), used with --radius none

two-masses: text and video each have a mass of their own, of total variance s exp(g), s = 0.1, with
g_t = w_t . gelu(W_t t') and g_v = w_v . gelu(W_v m'), m = mean_i f_i / |f_i|. For t and v of length one the
score is 1 + s minus half the expected squared distance of two draws, which is PCME++'s distance of masses.

A loss (LOSSES, weight --inclusion): the mass of a caption that fits more of the batch's videos includes those
of the captions of these videos.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from engine.controls import Control, with_cosine
from losses import LOSSES, cosine_scores
from model import FUSIONS, RADII, Frames, JointRadius, LinearRadius, Pairs, Text, matched


class RelativeRadius(LinearRadius):
    """R = |t| / sqrt(dim) exp(S W + b): the paper's form, in units of the text."""

    def exponent(self, sims: Tensor, text: Tensor | None, video: Tensor | None) -> Tensor:
        return super().exponent(sims, text, video) + log_unit(text)


class BoundedRadius(JointRadius):
    """R = r |t| / sqrt(dim) exp(tanh(e) / 2): its channels differ by a factor of e = 2.7 at most."""

    def __init__(self, frames: int, dim: int, initial: float = 1.0):
        super().__init__(frames, dim)
        self.size = nn.Parameter(torch.tensor(math.log(initial)))  # log r

    def exponent(self, sims: Tensor, text: Tensor | None, video: Tensor | None) -> Tensor:
        return self.size + torch.tanh(super().exponent(sims, text, video)) / 2 + log_unit(text)


def log_unit(text: Tensor | None) -> Float[Tensor, "*texts 1"]:
    """log(|t| / sqrt(dim)). Raises ValueError without t."""
    if text is None:
        raise ValueError("this radius needs t beside S: radius(text, frames, video).")
    return (text.norm(dim=-1, keepdim=True).clamp_min(1e-12) / text.shape[-1] ** 0.5).log()


class TwoMasses(Control):
    """cos(t, v) - (s exp(g_t) + s exp(g_v)) / 2 + s."""

    out_dim = 2
    variance = 0.1  # s

    def change(self, text: Text, frames: Frames, video: Pairs) -> Pairs:
        mean, (w_t, w_v) = F.normalize(frames, dim=-1).mean(dim=1), self.added["out"].weight
        t, m = (F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 for x in (text, mean))
        g_t, g_v = F.gelu(self.added["text"](t)) @ w_t, F.gelu(self.added["video"](m)) @ w_v
        size = self.variance * (g_t.exp()[:, None] + g_v.exp())
        return with_cosine(text, video, cosine_scores(text, video) - size / 2 + self.variance)


def inclusion(
    mean: Float[Tensor, "*a dim"],
    std: Float[Tensor, "*a dim"],
    of: Float[Tensor, "*b dim"],
    of_std: Float[Tensor, "*b dim"],
) -> Float[Tensor, "*c"]:
    """log of the integral of p^2 q minus log of that of p q^2, a channel: large where q includes p (ProLIP).

    p = N(of, of_std^2) and q = N(mean, std^2) have independent channels; the leading dimensions broadcast."""
    a, b, squared = of_std**2, std**2, (mean - of) ** 2
    here = (a / 2 + b).log() / 2 + of_std.log() + squared / (a + 2 * b)
    there = (b / 2 + a).log() / 2 + std.log() + squared / (b + 2 * a)
    return (there - here).mean(dim=-1)


def inclusion_loss(text: Text, video: Pairs, radius: Pairs, scale: Tensor | float, **_) -> Tensor:
    """L_inc = sum_ik w_ik softplus(- h_ik) / sum_ik w_ik, h_ik: how far mass i includes mass k.

        w_ik = max(0, p_ik - p_ki)       p_i = softmax_j(scale cos(t_i, v_ij)), without a gradient

    Text i includes text k where it fits the video of k better than k fits the video of i. Masses are those of
    matched pairs, in units of |t|."""
    fits = (cosine_scores(text, video) * scale).detach().softmax(dim=1)
    weight = (fits - fits.T).clamp_min(0)
    length = text.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    mean, std = text / length, matched(radius) / length
    h = inclusion(mean[:, None], std[:, None], mean, std)
    return (weight * F.softplus(-h)).sum() / weight.sum().clamp_min(1e-12)


LOSSES["L_inc"] = inclusion_loss
RADII.update(relative=RelativeRadius, bounded=BoundedRadius)
FUSIONS["two-masses"] = TwoMasses
