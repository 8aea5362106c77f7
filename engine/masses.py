"""Other masses, tried in the search for one that helps (`reproduce.py --table masses`); none is the paper's.

The radii (RADII) are in units of the text: with R = |t| / sqrt(dim) a draw's noise is as long as t.

    relative      R = |t| / sqrt(dim) exp(S W + b)
    bounded       R = r |t| / sqrt(dim) exp(tanh(e) / 2)      e: the exponent of JointRadius; r is learned
    two-masses    cos(t, v) - (s exp(g_t) + s exp(g_v)) / 2 + s       a psi (FUSIONS), used with --radius none

two-masses: text and video each have a mass of their own, of total variance s exp(g), s = 0.1, with
g_t = w_t . gelu(W_t t') and g_v = w_v . gelu(W_v m'), m = mean_i f_i / |f_i|. For t and v of length one the
score is 1 + s minus half the expected squared distance of two draws, which is PCME++'s distance of masses.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from engine.controls import Control, with_cosine
from losses import cosine_scores
from model import FUSIONS, RADII, Frames, JointRadius, LinearRadius, Pairs, Text


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


RADII.update(relative=RelativeRadius, bounded=BoundedRadius)
FUSIONS["two-masses"] = TwoMasses
