"""Losses of T-MASS: L_ce ("Preliminaries"), L_s and L_sup ("Learning Text Mass in Joint Space").

A batch holds n texts and their n videos; text i belongs to video i. `tmass_loss` makes every recipe's loss.
Copy this file anywhere: it needs torch and jaxtyping, and reads no config.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def cosine_scores(
    text: Float[Tensor, "texts dim"] | Float[Tensor, "texts videos dim"],
    video: Float[Tensor, "texts videos dim"],
) -> Float[Tensor, "texts videos"]:
    """s(t, v) = cos(t_i, v_ij): every text with every video, as that text pools it ("Preliminaries").

    `text` holds one point a text (t, t_sup, t_s of the matched pair) or one a pair (t_s of every pair)."""
    text = text[:, None] if text.dim() == 2 else text
    return (F.normalize(text, dim=-1) * video).sum(dim=-1) / video.norm(dim=-1).clamp_min(1e-12)


def symmetric_cross_entropy(
    scores: Float[Tensor, "n n"], scale: Float[Tensor, ""] | float
) -> Float[Tensor, ""]:
    """L_ce = (L_t2v + L_v2t) / 2 of cosine scores; scale = 1 / tau = exp(logit_scale) ("Preliminaries").

        L_t2v = - mean_i log softmax_j(scale s_ij)[i]         text i finds its video among the batch's
        L_v2t = - mean_j log softmax_i(scale s_ij)[j]         video j finds its text

    Constant scores give log(n)."""
    logits = scores * scale
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def text_loss(text: Tensor, video: Tensor, scale: Tensor | float, text_scores=None, **_) -> Tensor:
    """L_ce: the scores of t itself, cos(t, v). The whole loss of X-Pool and of mean pooling."""
    return symmetric_cross_entropy(cosine_scores(text, video) if text_scores is None else text_scores, scale)


def stochastic_loss(mass_scores: Tensor, scale: Tensor | float, **_) -> Tensor:
    """L_s: L_ce with the drawn text t_s in the place of t."""
    return symmetric_cross_entropy(mass_scores, scale)


def support_loss(t_sup: Tensor, video: Tensor, scale: Tensor | float, sup_scores=None, **_) -> Tensor:
    """L_sup: L_ce with the support text t_sup in the place of t. It steers the mass's direction and size."""
    return symmetric_cross_entropy(cosine_scores(t_sup, video) if sup_scores is None else sup_scores, scale)


# Every loss by its name. To add one, write a function that names the symbols it uses, list it here, and give
# its weight in engine/config.py (`loss_weights`).
LOSSES: dict[str, Callable[..., Tensor]] = {"L_s": stochastic_loss, "L_sup": support_loss, "L_ce": text_loss}


def tmass_loss(
    weights: dict[str, float],
    *,
    scale: Float[Tensor, ""] | float,
    text: Float[Tensor, "n dim"],
    video: Float[Tensor, "n n dim"],
    radius: Float[Tensor, "n n dim"] | None = None,
    mass_scores: Float[Tensor, "n n"] | None = None,
    t_sup: Float[Tensor, "n dim"] | None = None,
    text_scores: Float[Tensor, "n n"] | None = None,
    sup_scores: Float[Tensor, "n n"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """L_total = sum_k weights[k] L_k over LOSSES, and its parts; a loss of weight 0 is left out.

        the paper    L_s + alpha L_sup        {"L_s": 1, "L_sup": alpha, "L_ce": 0}
        no mass      L_ce                     {"L_s": 0, "L_sup": 0, "L_ce": 1}

    mass_scores: cos(t_s, v) of one drawn text, or the expected best of M draws (--pairs).
    text_scores, sup_scores: cos(t, v) and cos(t_sup, v), if they are known already.
    The released code draws t_s for matched pairs only in training; its weight of L_sup is 0 by default.
    Raises ValueError unless every loss has a weight, and every weight a loss."""
    if weights.keys() != LOSSES.keys():
        names = ", ".join(sorted(weights.keys() ^ LOSSES.keys()))
        raise ValueError(f"LOSSES of losses.py and loss_weights of engine/config.py differ in {names}.")
    symbols = dict(text=text, video=video, scale=scale, radius=radius, mass_scores=mass_scores, t_sup=t_sup)
    symbols |= dict(text_scores=text_scores, sup_scores=sup_scores)
    parts = {name: loss(**symbols) for name, loss in LOSSES.items() if weights[name]}
    return sum(weights[name] * part for name, part in parts.items()), parts
