"""Losses of T-MASS: symmetric cross entropy (Preliminaries), L_s and the support-text regularisation L_sup (Learning Text Mass in Joint Space).

A batch of n texts and their n videos: text i belongs to video i. Copy this file anywhere: it needs torch and jaxtyping, reads no config.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def cosine_scores(
    text: Float[Tensor, "texts dim"] | Float[Tensor, "texts videos dim"],
    video: Float[Tensor, "texts videos dim"],
) -> Float[Tensor, "texts videos"]:
    """s(t, v) = cos(t_i, v_ij): every text with every video, as that text pools it ("Preliminaries").

    `text` is one point a text (t, t_sup, or t_s drawn for the matched pair), or one a pair (t_s drawn for every pair)."""
    if text.dim() == 2:
        text = text[:, None]
    return (F.normalize(text, dim=-1) * F.normalize(video, dim=-1)).sum(dim=-1)


def symmetric_cross_entropy(scores: Float[Tensor, "n n"], scale: Float[Tensor, ""] | float) -> Float[Tensor, ""]:
    """L_ce = (L_t2v + L_v2t) / 2 of cosine scores; scale = 1 / tau = exp(logit_scale) ("Preliminaries").

        L_t2v = - mean_i log softmax_j(scale s_ij)[i]         text i finds its video among the batch's
        L_v2t = - mean_j log softmax_i(scale s_ij)[j]         video j finds its text

    Constant scores give log(n)."""
    logits = scores * scale
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def tmass_loss(
    t_s: Float[Tensor, "n dim"] | Float[Tensor, "n n dim"],
    t_sup: Float[Tensor, "n dim"],
    video: Float[Tensor, "n n dim"],
    scale: Float[Tensor, ""] | float,
    alpha: float = 1.2,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """L_total = L_s + alpha L_sup, and its parts ("Learning Text Mass in Joint Space").

        L_s     symmetric cross entropy with the drawn text t_s in the place of t
        L_sup   the same with the support text t_sup: it steers the mass's direction and size

    t_s is (n, dim) where it is drawn for matched pairs only, as the released code trains, and (n, n, dim) where it is drawn for every
    pair, as inference does. In the released code L_sup has weight 0 by default."""
    parts = {
        "L_s": symmetric_cross_entropy(cosine_scores(t_s, video), scale),
        "L_sup": symmetric_cross_entropy(cosine_scores(t_sup, video), scale),
    }
    return parts["L_s"] + alpha * parts["L_sup"], parts
