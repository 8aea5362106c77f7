"""Retrieval metrics ("Evaluation Metrics"): ranks, R@K, MdR, MnR, relevance, their table, dual softmax.

Which text describes which video is `owner`. No score is computed from it, so no score profits from the
pairing. Copy this file anywhere: it needs torch and jaxtyping."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

COLUMNS = ("R@1", "R@5", "R@10", "MdR", "MnR", "fits@1")  # of the table


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


def relevance_metrics(
    scores: Float[Tensor, "texts videos"], relevant: Bool[Tensor, "texts videos"]
) -> dict[str, float]:
    """How many of the first videos are relevant, where all that are relevant are known; percent.

        fits@1        share of texts whose first video is relevant
        R-Precision   share of relevant videos among the first n, n being the number of a text's relevant ones
        mAP@R         1/n sum over ranks k <= n: precision among the first k if the k-th is relevant, else 0

    R-Precision and mAP@R as in ECCV Caption (Chun et al., 2022, after Musgrave et al., 2020). Tied scores
    count with their expectation under a random order. Texts without a relevant video are left out."""
    scores, relevant = scores[relevant.any(dim=1)], relevant[relevant.any(dim=1)].to(scores.device)
    values, order = scores.sort(dim=1, descending=True)
    hits = relevant.gather(1, order).double()
    place = torch.arange(1.0, scores.shape[1] + 1, dtype=torch.double, device=scores.device)
    # Of the level of equal scores that each rank lies in: how many there are before it, in it, relevant ones.
    level = F.pad((values.diff(dim=1) != 0).long(), (1, 0)).cumsum(dim=1)
    of_level = torch.zeros_like(hits)
    size = of_level.scatter_add(1, level, torch.ones_like(hits))
    found = of_level.scatter_add(1, level, hits)
    before, found_before = (x.cumsum(dim=1) - x for x in (size, found))
    size, found, before, found_before = (x.gather(1, level) for x in (size, found, before, found_before))
    share = found / size  # the expected relevance of a rank
    others = (place - before - 1) * (found - 1) / (size - 1).clamp(min=1)  # relevant ones ahead in its level
    precision = share * (found_before + 1 + others) / place
    n = hits.sum(dim=1, keepdim=True)
    first = place <= n
    means = {"fits@1": share[:, :1], "R-Precision": (share * first) / n, "mAP@R": (precision * first) / n}
    return {name: x.sum(dim=1).mean().item() * 100 for name, x in means.items()}


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
    """Markdown table of retrieval_metrics: a row a run, text to video above, video to text below."""
    columns = [name for name in COLUMNS if any(name in metrics["t2v"] for metrics in rows.values())]
    width = max(map(len, [*rows, "text to video"]))

    def line(name: str, cells: Sequence[str]) -> str:
        return f"| {name:<{width}} |" + "".join(f" {cell:>6} |" for cell in cells)

    lines = [line("text to video", columns), f"|{'-' * (width + 2)}|" + "-------:|" * len(columns)]
    for way in ("t2v", "v2t"):
        if way == "v2t":
            lines.append(line("video to text", [""] * len(columns)))
        for run, metrics in rows.items():
            known = metrics[way]
            lines.append(line(run, [f"{known[name]:.1f}" if name in known else "" for name in columns]))
    return "\n".join(lines)
