"""What a training step needs of a batch (v, the cosines of its texts), by fewer products than psi and R.

The same mathematics as in train.forward; a test holds values and gradients to it. It knows X-Pool's psi with
one head, its controls and the radii of model.py. Any other psi, R or loss takes the literal form. With x_i,
frame i after LN1 without scale and shift (constant where the features are frozen), and M' for M transposed:

    q . k_i = (gamma1 W_k' q) . x_i + number of the text    W_k acts on the texts; softmax drops the number
    y_i     = W_o (W_v LN1(f_i) + b_v) + b_o, centred       sum_i a_i = 1: W_v and W_o act on the frames
    o       = sum_i w_i gamma2 y_i + beta2                  LN2: w = a / sqrt(a' G a + eps), G = Y Y' / dim
    P o     = sum_i w_i P gamma2 y_i + (P beta2 + b)        P acts on the frames too
    v       = LN3(o + dropout(P o))

So no dim x dim product is left for each pair, only products with the T' + 1 vectors of a video. The mask of
the dropout takes 16 random bits a number: p is rounded to a multiple of 2^-16, and the scale is exact for it.
R is computed for matched pairs if the loss reads no others; --pairs delta needs five sums over channels.
`best_of_draws` serves the literal form, too: M draws of every pair in three products.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from engine.config import Config, loss_weights
from engine.controls import Control
from engine.masses import inclusion_loss
from engine.scoring import Delta
from losses import LOSSES, stochastic_loss, support_loss, text_loss
from model import (
    TMASS,
    FixedRadius,
    Frames,
    JointRadius,
    LinearRadius,
    Pairs,
    ScalarRadius,
    Text,
    XPool,
    cosine_similarities,
    matched,
    sample_noise,
    stochastic_text,
    support_text,
)

KNOWN_LOSSES = {"L_s": stochastic_loss, "L_sup": support_loss, "L_ce": text_loss}  # they read no radius
KNOWN_LOSSES["L_inc"] = inclusion_loss  # where its weight is 0
KNOWN_RADII = (FixedRadius, ScalarRadius, LinearRadius, JointRadius)


def fast_symbols(model: TMASS, text: Text, frames: Frames, config: Config) -> dict[str, Tensor | None] | None:
    """The symbols of tmass_loss for a batch, or None where only the literal form is known to be right."""
    psi, radius, pairs = model.fusion, model.radius, config.pairs
    control = isinstance(psi, Control) and type(psi).forward is Control.forward and radius is None
    known = type(psi) is XPool or control
    literal = LOSSES != KNOWN_LOSSES or (config.inclusion and radius is not None)
    if not known or psi.heads > 1 or psi.dropout.p > 0.99 or literal:
        return None
    if radius is None:
        video = pool(psi, text, frames)
        video = video if type(psi) is XPool else psi.change(text, frames, video)
        return dict(text=text, video=video, text_scores=cosines(video, text)[0])
    if pairs == "matched" and type(radius) in KNOWN_RADII:
        video = pool(psi, text, frames)
        own = matched(video)
        sims = (F.normalize(text, dim=-1)[:, None] * F.normalize(frames, dim=-1)).sum(dim=-1)
        mass = radius.from_similarities(sims, text, own)  # R of matched pairs, (texts, dim)
        noise = sample_noise(1, len(text), 1, text.shape[1], **config.eps, device=text.device)
        t_s = stochastic_text(text, mass[:, None], noise)[0].squeeze(1)
        t_sup, weights = support_text(text, own, mass) if config.alpha else None, loss_weights(config)
        of = {"L_s": ("mass_scores", t_s), "L_sup": ("sup_scores", t_sup), "L_ce": ("text_scores", text)}
        names, texts = zip(*(of[name] for name in of if weights[name]))
        return dict(text=text, video=video, t_sup=t_sup, **dict(zip(names, cosines(video, *texts))))
    if pairs == "delta" and type(radius) is JointRadius and config.prior == "normal" and not config.alpha:
        video = pool(psi, text, frames)
        mass_scores, text_scores = joint_delta(radius, text, frames, video, config.M, config.prior_std)
        return dict(text=text, video=video, mass_scores=mass_scores, text_scores=text_scores)
    return None


# ------------------------------------------------------------------------------------- draws (--pairs draws)


def drawn_cosines(
    text: Float[Tensor, "texts dim"], radius: Tensor, video: Tensor, noise: Float[Tensor, "M dim"]
) -> Float[Tensor, "M texts videos"]:
    """cos(t + R eps_m, v) of every pair and draw, by three products with the bank; with gradients."""
    square = text.square().sum(-1)[:, None]
    dot = (text[:, None] * video).sum(-1) + torch.einsum("md,tvd->mtv", noise, radius * video)
    cross = 2 * torch.einsum("md,tvd->mtv", noise, radius * text[:, None])
    squares = square + cross + torch.einsum("md,tvd->mtv", noise.square(), radius.square())
    return dot * squares.clamp_min(1e-24).rsqrt() / video.norm(dim=-1).clamp_min(1e-12)


def best_of_draws(
    text: Float[Tensor, "texts dim"],
    radius: Tensor,
    video: Tensor,
    noise: Float[Tensor, "M dim"],
    scale: Tensor | float | None = None,
) -> Float[Tensor, "texts videos"]:
    """max_m cos(t + R eps_m, v); with `scale` the soft maximum log(mean_m exp(scale cos)) / scale."""
    cosines = drawn_cosines(text, radius, video, noise)
    if scale is None:
        return cosines.amax(dim=0)
    return ((scale * cosines).logsumexp(dim=0) - math.log(len(noise))) / scale


# ------------------------------------------------------------------------------------------------------- psi


def pool(psi: XPool, text: Text, frames: Frames) -> Pairs:
    """v = psi(t, f) of every pair, for one head."""
    videos, dim = len(frames), text.shape[1]
    x = F.layer_norm(frames, (dim,), eps=psi.norm1.eps).flatten(0, 1)  # (videos x frames, dim)
    query = psi.query(psi.norm1(text)) / dim**0.5
    logits = ((query @ psi.key.weight) * psi.norm1.weight) @ x.T + (query @ psi.key(psi.norm1.bias))[:, None]
    a = logits.unflatten(1, (videos, -1)).softmax(dim=-1).transpose(0, 1)  # (videos, texts, frames)

    out, shift = centred(psi.out.weight, 0), centred(psi.out(psi.value(psi.norm1.bias)), 0)
    y = torch.linalg.multi_dot([x, (psi.value.weight * psi.norm1.weight).T, out.T]) + shift
    z = F.linear(y, psi.linear.weight * psi.norm2.weight).unflatten(0, (videos, -1))  # P gamma2 y
    y = y.unflatten(0, (videos, -1))
    variance = (a @ (y @ y.mT) * a).sum(dim=-1, keepdim=True) / dim
    inverse_sigma = (variance + psi.norm2.eps).rsqrt()
    w = torch.cat([a * inverse_sigma, torch.ones_like(inverse_sigma)], dim=-1)  # (videos, texts, frames + 1)
    o = torch.cat([y * psi.norm2.weight, psi.norm2.bias.expand(videos, 1, dim)], dim=1)
    p = torch.cat([z, psi.linear(psi.norm2.bias).expand(videos, 1, dim)], dim=1)
    if psi.training and psi.dropout.p > 0:
        keep, scale = dropout_mask((len(text), videos, dim), psi.dropout.p, x)
        return psi.norm3(_Pooled.apply(w, torch.cat([o, p * scale], dim=-1), keep))
    return psi.norm3((w @ (o + p)).transpose(0, 1).contiguous())


def centred(x: Tensor, axis: int) -> Tensor:
    """x without its mean along an axis."""
    return x - x.mean(dim=axis, keepdim=True)


def dropout_mask(shape: tuple[int, ...], p: float, like: Tensor) -> tuple[Tensor, float]:
    """1 where a number is kept, else 0, and the factor 1 / (1 - p) for what is kept.

    p is rounded to a multiple of 2^-16: each number takes 16 bits of torch's generator."""
    dropped, count = max(1, round(p * 2**16)), math.prod(shape)
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    numbers = bits.view(torch.int16)[:count].view(shape)  # even from -2^15 to 2^15 - 1
    keep = torch.empty(shape, dtype=like.dtype, device=like.device)
    torch.ge(numbers, dropped - 2**15, out=keep)
    return keep, 2**16 / (2**16 - dropped)


class _Pooled(torch.autograd.Function):
    """w o + keep (w p), (texts, videos, dim); w (videos, texts, k), o and p in one (videos, k, 2 dim)."""

    @staticmethod
    def forward(ctx, w: Tensor, both: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(w, both, keep)
        o, p = torch.bmm(w, both).transpose(0, 1).chunk(2, dim=-1)
        return torch.addcmul(o, p, keep, out=torch.empty_like(keep))

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, None]:
        w, both, keep = ctx.saved_tensors
        (o, p), (of_o, of_p) = both.chunk(2, dim=-1), (x.transpose(0, 1) for x in (g, g * keep))
        of_both = torch.cat([torch.bmm(w.mT, of_o), torch.bmm(w.mT, of_p)], dim=-1)
        return torch.baddbmm(torch.bmm(of_o, o.mT), of_p, p.mT), of_both, None


# --------------------------------------------------------------------- scores of matched R, and --pairs delta


def cosines(
    video: Float[Tensor, "texts videos dim"], *texts: Float[Tensor, "texts dim"]
) -> list[Float[Tensor, "texts videos"]]:
    """cos(t, v) of every pair, for each of some texts t. All share the passes over v."""
    return list(_Cosines.apply(F.normalize(torch.stack(texts, dim=1), dim=-1), video).unbind(dim=-1))


class _Cosines(torch.autograd.Function):
    """cos(t, v), (texts, videos, k), for k unit t (texts, k, dim) and v (texts, videos, dim)."""

    @staticmethod
    def forward(ctx, t: Tensor, v: Tensor) -> Tensor:
        length = v.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        found = torch.bmm(v, t.mT).div_(length)
        ctx.save_for_backward(t, v, found, length)
        return found

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        t, v, found, length = ctx.saved_tensors
        g = g / length
        along = -(g * found).sum(dim=-1, keepdim=True) / length
        return torch.bmm(g.mT, v), torch.bmm(g, t).addcmul_(v, along)


def joint_delta(
    radius: JointRadius, text: Text, frames: Frames, video: Pairs, M: int, std: float
) -> tuple[Float[Tensor, "texts videos"], Float[Tensor, "texts videos"]]:
    """engine.scoring.Delta of all pairs, with R of t and v; and cos(t, v), of the same sums."""
    dim, sims, linear = text.shape[1], cosine_similarities(text, frames), radius.linear
    of_text = radius.text(F.normalize(text, dim=-1) * dim**0.5)[:, None]  # W_t t'
    hidden, length = _Hidden.apply(of_text, video, radius.video.weight)
    log_r2 = F.linear(sims.flatten(0, 1), 2 * linear.weight, 2 * linear.bias)  # 2 (S W + b), then 2 e
    log_r2.addmm_(hidden.flatten(0, 1), 2 * radius.out.weight.T)
    x, r, A, B, C = _Sums.apply(log_r2.view_as(video), text[:, None], video)
    square = text.square().sum(dim=-1, keepdim=True)
    n, length = (square + std**2 * r).clamp_min(1e-24), length.squeeze(-1)
    cosine = x / length / square.clamp_min(1e-24).sqrt()
    return Delta(M, std=std).from_sums(x, n, A, B, C) / length, cosine


class _Hidden(torch.autograd.Function):
    """gelu(W_t t' + W_v v') of all pairs, v' = sqrt(dim) v / |v|; and |v|, (texts, videos, 1).

    of_text is W_t t', (texts, 1, dim), and W is W_v."""

    @staticmethod
    def forward(ctx, of_text: Tensor, v: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        length = v.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        moved, scale = F.linear(v, W), v.shape[-1] ** 0.5 / length
        x = torch.addcmul(of_text, moved, scale)
        ctx.save_for_backward(v, W, length, moved, scale, x)
        return F.gelu(x), length

    @staticmethod
    def backward(ctx, g: Tensor, of_length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, W, length, moved, scale, x = ctx.saved_tensors
        g = torch.ops.aten.gelu_backward(g, x)
        of_text, of_scale = g.sum(dim=1, keepdim=True), moved.mul_(g).sum(dim=-1, keepdim=True)
        g = g.mul_(scale).flatten(0, 1)
        of_v = (g @ W).view_as(v).addcmul_(v, (of_length - of_scale * scale / length) / length)
        return of_text, of_v, g.T @ v.flatten(0, 1)


class _Sums(torch.autograd.Function):
    """Sums over channels of t v, R^2, R^2 v^2, R^2 v t and R^2 t^2, of log R^2.

    log R^2 and v are (texts, videos, dim), t is (texts, 1, dim). By hand, to pass over memory less often."""

    @staticmethod
    def forward(ctx, log_r2: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        q = log_r2.exp()
        ctx.save_for_backward(q, t, v)
        part = q * v
        x, B, C = (torch.bmm(a, b.mT).squeeze(-1) for a, b in ((v, t), (part, t), (q, t.square())))
        return x, q.sum(dim=-1), part.mul_(v).sum(dim=-1), B, C

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        q, t, v = ctx.saved_tensors
        gx, gr, gA, gB, gC = (g[..., None] for g in gradients)
        gt = None
        if ctx.needs_input_grad[1]:
            gt = ((gB * q + gx) * v + 2 * gC * q * t).sum(dim=1, keepdim=True)
        part = torch.baddbmm(gA * v, gB, t)
        ge = (part * v).baddbmm_(gC, t.square()).add_(gr).mul_(q)
        gv = part.addcmul_(gA, v).mul_(q).baddbmm_(gx, t)
        return ge, gt, gv
