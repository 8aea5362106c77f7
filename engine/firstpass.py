"""A first look at all clips of a large library: approximate scores, which choose the clips to score exactly.

The exact score of a clip costs three dim x dim products. A first look reads each frame once, for its
attention and for the pooled frame p, and then takes products with few vectors. With p' = p / |p| and the
scales of the two last LayerNorms written as one,

    v = gamma3 (Z p' + ..) / N + beta3,    Z = C (I + P) gamma2 C W_o W_v gamma1 C,    N^2 = |Z p'|^2

where C subtracts the mean over channels. Z stays near a multiple of a rotation when psi is trained, so N^2 is
taken as lambda + sum_k (lambda_k - lambda) (e_k . p')^2 over the few eigenvectors of Z'Z that differ most.
R differs little between clips that fit a text. So the score is taken as

    max_m (slope u_m . p' / N + level_m),    u_m = Z' gamma3 t_m / |t_m|,    t_m = t + R eps_m

with R, slope and levels fitted to exact values of a sample of clips.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, Float32
from torch import Tensor

from engine.scoring import in_threads
from model import TMASS, MeanPool, XPool

EIGENVECTORS = 16
SAMPLE = 256  # clips on which a first look is fitted
PIECE = 2048  # clips that a thread takes at a time
BLOCK = 64  # of these at a time, on a CPU: 12 x 512 frames of so many in float32 fit the cache of a core


class FirstLook:
    """What of a model's psi a first look needs. It takes any R."""

    @staticmethod
    def knows(model: TMASS) -> bool:
        """Whether the model's psi is known: X-Pool's with one head, or mean pooling."""
        psi = model.fusion
        return type(psi) is MeanPool or (type(psi) is XPool and psi.heads == 1)

    @torch.no_grad()
    def __init__(self, model: TMASS):
        self.model, psi = model, model.fusion
        if type(psi) is MeanPool:
            return
        z = _centred(psi.out.weight @ (psi.value.weight * psi.norm1.weight)) * psi.norm2.weight[:, None]
        self.z = _centred(_centred(z + psi.linear.weight @ z), 1)
        values, vectors = torch.linalg.eigh(self.z.T @ self.z)
        order = (values - values.median()).abs().argsort(descending=True)
        few, rest = order[:EIGENVECTORS], order[EIGENVECTORS:]
        self.usual = values[rest].mean() if len(rest) else values.new_zeros(())
        self.vectors, self.gains = vectors[:, few], values[few] - self.usual

    def fit(
        self,
        text: Float[Tensor, "1 dim"],
        noise: Float[Tensor, "M dim"],
        sample: Float[Tensor, "sample frames dim"],
    ) -> "Fitted":
        """The first look for one text."""
        return Fitted(self, text, noise, sample)


class Fitted:
    """Approximate scores of one text. sample: clips on which they are fitted, some hundred."""

    @torch.no_grad()
    def __init__(self, look: FirstLook, text: Tensor, noise: Tensor, sample: Tensor):
        self.look, model, psi = look, look.model, look.model.fusion
        video, drawn = psi(text, sample)[0], text  # v of the sample, (sample, dim)
        if model.radius is not None and len(noise):
            radius = model.radius(text, sample, video[None])[0].clamp_min(1e-30).log().mean(dim=0).exp()
            drawn = text + radius * noise
        drawn = F.normalize(drawn, dim=-1)  # t_m / |t_m|, (M, dim)
        if type(psi) is MeanPool:
            self.query, self.vectors, self.draws = torch.zeros_like(text[0]), drawn.T, len(drawn)
        else:
            query = psi.key.weight.T @ psi.query(psi.norm1(text))[0] / text.shape[1] ** 0.5
            self.query = _centred(query * psi.norm1.weight)
            u = look.z.T @ (drawn * psi.norm3.weight).T  # (dim, M)
            self.vectors, self.draws = torch.cat([u, look.vectors], dim=1), len(drawn)
        scale = (sample.var(dim=-1, correction=0) + 1e-5).rsqrt()
        x = self._products(self._pooled(sample, scale))  # (sample, M)
        own, y = x - x.mean(dim=0), F.normalize(video, dim=-1) @ drawn.T
        self.slope = (own * y).sum() / own.square().sum().clamp_min(1e-12)
        self.level = y.mean(dim=0) - self.slope * x.mean(dim=0)

    def _pooled(
        self, frames: Float[Tensor, "clips frames dim"], scale: Float[Tensor, "clips frames"]
    ) -> Float[Tensor, "clips dim"]:
        """p of clips, up to its length. A block of frames is converted, read twice, then overwritten.

        Few calls and no views in the loop: each takes Python's lock again, for which the threads wait."""
        length = BLOCK if self.query.device.type == "cpu" else len(frames)
        scale, block = scale[:, None].to(self.query), frames[:0]
        pooled = self.query.new_empty(len(frames), 1, frames.shape[2])
        for f, s, p in zip(frames.split(length), scale.split(length), pooled.split(length)):
            if len(f) != len(block):  # the first block, and the last one if it is shorter
                block, a = self.query.new_empty(f.shape), self.query.new_empty(s.shape)
                rows, logits = block.flatten(0, 1), a.flatten()  # the same memory
            block.copy_(f)
            torch.mv(rows, self.query, out=logits)
            a.mul_(s)
            a.sub_(a.amax(dim=2, keepdim=True)).exp_()  # a softmax, up to its sum
            torch.bmm(a.mul_(s), block, out=p)  # weights of the frames before LN1
        return pooled[:, 0]

    def _products(self, p: Float[Tensor, "clips dim"]) -> Float[Tensor, "clips M"]:
        """u_m . p' / N of clips."""
        length = torch.linalg.vector_norm(p, dim=1, keepdim=True).clamp_min(1e-12)
        products = (p @ self.vectors).div_(length)
        if type(self.look.model.fusion) is MeanPool:
            return products
        squares = self.look.usual + products[:, self.draws :].square() @ self.look.gains
        return products[:, : self.draws] * squares.clamp_min(1e-12).rsqrt()[:, None]

    @torch.no_grad()
    def scores(
        self, frames: Float16[np.ndarray, "clips frames dim"], scale: Float32[np.ndarray, "clips frames"]
    ) -> Float[Tensor, " clips"]:
        """The approximate scores of clips. scale: 1 / standard deviation of each frame over its channels."""
        x = self._products(self._pooled(torch.from_numpy(frames), torch.from_numpy(scale)))
        return (x * self.slope + self.level).amax(dim=1).cpu()

    def all_scores(self, pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> Float[Tensor, " clips"]:
        """The approximate scores of all pieces (frames, scale), with a thread for each of torch's."""
        pieces = list(pieces)
        found = [torch.empty(0)] * len(pieces)

        def work(n: int) -> None:
            found[n] = self.scores(*pieces[n])

        list(in_threads(work, range(len(pieces))))
        return torch.cat(found)


def _centred(x: Tensor, dim: int = 0) -> Tensor:
    return x - x.mean(dim=dim, keepdim=True)
