"""Retrieval metrics ("Evaluation Metrics"): ranks, R@K, MdR, MnR, their table, and dual softmax.

Which text describes which video is `owner`. No score is computed from it, so no score profits from the
pairing. Copy this file anywhere: it needs torch and jaxtyping."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

COLUMNS = ("R@1", "R@5", "R@10", "R@50", "MdR", "MnR")


def retrieval_metrics(
    scores: Float[Tensor, "texts videos"], owner: Int[Tensor, " texts"]
) -> dict[str, dict[str, float]]:
    """{"t2v": ..., "v2t": ...}: R@1/5/10/50 (percent), MdR and MnR (median and mean rank, from 1).

        t2v    every caption is a query: the rank of its video among all videos
        v2t    every video that has a caption is a query: the rank of its best caption among all captions

    owner: the video that each text describes. Tied scores get their expected rank, so constant scores are at
    chance, not first. Raises ValueError for scores that are NaN or infinite."""
    if not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).sum())
        raise ValueError(f"{bad} of {scores.numel()} scores are NaN or infinite and cannot be ranked.")
    own = F.one_hot(owner.to(scores.device), scores.shape[1]).bool()  # (texts, videos)
    videos = own.any(dim=0)
    return {
        "t2v": _summary(_ranks(scores, own)),
        "v2t": _summary(_ranks(scores.T[videos], own.T[videos])),
    }


def text_to_video_ranks(
    scores: Float[Tensor, "texts videos"], owner: Int[Tensor, " texts"]
) -> Float[Tensor, " texts"]:
    """The rank of each text's video, from 1. Tied scores get their expected rank."""
    return _ranks(scores, F.one_hot(owner.to(scores.device), scores.shape[1]).bool())


def _ranks(scores: Float[Tensor, "queries items"], own: Tensor) -> Float[Tensor, " queries"]:
    """Expected rank of the best own item when ties are broken at random, from 1.

    With g items above it, and l items on its level of which k are own: g + (l + 1) / (k + 1)."""
    best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    above = (scores > best).sum(dim=1)
    level = (scores == best).sum(dim=1)
    level_own = ((scores == best) & own).sum(dim=1)
    return above + (level + 1) / (level_own + 1)


def _summary(ranks: Float[Tensor, " queries"]) -> dict[str, float]:
    """The columns of the table."""
    ranks = ranks.double()
    recall = {f"R@{k}": (ranks <= k).double().mean().item() * 100 for k in (1, 5, 10, 50)}
    return {**recall, "MdR": ranks.quantile(0.5).item(), "MnR": ranks.mean().item()}


def dual_softmax(scores: Float[Tensor, "texts videos"], scale: float) -> Float[Tensor, "texts videos"]:
    """Each score times the softmax of its column: texts compete for a video first (--dsl).

    The released code offers it. TRANSDUCTIVE: a score depends on all test queries at once, which a search
    engine does not have. Numbers with it do not compare with numbers without."""
    return scores * (scale * scores).softmax(dim=0)


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown table of retrieval_metrics: a row a run, t2v on the left, v2t on the right."""
    width = max(len(name) for name in [*rows, "method"])
    columns = [(direction, name) for direction in ("t2v", "v2t") for name in COLUMNS]
    head = f"| {'method':<{width}} |" + "".join(f" {direction} {name:<4} |" for direction, name in columns)
    rule = f"|{'-' * (width + 2)}|" + "---------:|" * len(columns)
    lines = [
        f"| {run:<{width}} |" + "".join(f" {metrics[direction][name]:>8.1f} |" for direction, name in columns)
        for run, metrics in rows.items()
    ]
    return "\n".join([head, rule, *lines])
