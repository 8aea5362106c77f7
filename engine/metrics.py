"""Retrieval metrics ("Evaluation Metrics"): ranks, R@K, MdR, MnR, relevance, their table, dual softmax.

Which text describes which video is `owner`. No score is computed from it, so no score profits from the
pairing; `audit` tests any score function for that. Copy this file anywhere: it needs torch and jaxtyping."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

COLUMNS = ("R@1", "R@5", "R@10", "MdR", "MnR", "fits@1")  # of the table


def retrieval_metrics(
    scores: Float[Tensor, "texts videos"], owner: Int[Tensor, " texts"]
) -> dict[str, dict[str, float]]:
    """{"t2v": ..., "v2t": ...}: R@1/5/10/50 (percent), MdR and MnR (median and mean rank, from 1).

        t2v    every caption is a query: the rank of its video among all videos
        v2t    every video that has a caption is a query: the rank of its own captions among those of all
               videos, where the best score over a video's captions stands for them (as in X-Pool's code)

    owner: the video that each text describes. Where scores are tied, every number is its expectation under a
    random order of them, so constant scores are at chance. Raises ValueError for NaN or infinite scores."""
    if not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).sum())
        raise ValueError(f"{bad} of {scores.numel()} scores are NaN or infinite and cannot be ranked.")
    return {way: _summary(*places) for way, places in _both_ways(scores, owner).items()}


def first_hits(
    scores: Float[Tensor, "texts videos"], owner: Int[Tensor, " texts"], k: int = 1
) -> dict[str, Float[Tensor, " queries"]]:
    """{"t2v": ..., "v2t": ...}: the R@k of each query of retrieval_metrics, in percent: 0, 100, or, where
    its own item shares the k-th place, its expectation. "v2t": the videos with a caption, in order."""
    places = _both_ways(scores, owner).items()
    return {way: ((k - above) / level).clamp(0, 1) * 100 for way, (above, level) in places}


def relevance_metrics(
    scores: Float[Tensor, "texts videos"], relevant: Bool[Tensor, "texts videos"]
) -> dict[str, float]:
    """How many of the first videos are relevant, where all that are relevant are known; percent.

        fits@1        share of texts whose first video is relevant
        R-Precision   share of relevant videos among the first n, n being the number of a text's relevant ones
        mAP@R         1/n sum over ranks k <= n: precision among the first k if the k-th is relevant, else 0

    R-Precision and mAP@R as in ECCV Caption (Chun et al., 2022, after Musgrave et al., 2020). Tied scores
    count with their expectation under a random order. Texts without a relevant video are left out."""
    known = relevant.any(dim=1)
    found = relevance_of_each(scores[known.to(scores.device)], relevant[known])
    return {name: x.mean().item() for name, x in found.items()}


def relevance_of_each(
    scores: Float[Tensor, "texts videos"], relevant: Bool[Tensor, "texts videos"]
) -> dict[str, Float[Tensor, " texts"]]:
    """The numbers of relevance_metrics of each text; every text must have a relevant video."""
    relevant = relevant.to(scores.device)
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
    return {name: x.sum(dim=1) * 100 for name, x in means.items()}


def text_to_video_ranks(
    scores: Float[Tensor, "texts videos"], owner: Int[Tensor, " texts"]
) -> Float[Tensor, " texts"]:
    """The rank of each text's video, from 1: with ties its expected rank, from which R@K does not follow."""
    above, level = _places(scores, owner.to(scores.device))
    return above + (level + 1) / 2


def _both_ways(scores: Tensor, owner: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """_places of the texts among videos, and of the videos among the best captions of videos."""
    owner = owner.to(scores.device)
    captioned = owner.unique()
    best = torch.full_like(scores[:1], -torch.inf).repeat(scores.shape[1], 1)  # (captions of a video, videos)
    best = best.scatter_reduce(0, owner[:, None].expand_as(scores), scores, "amax")
    numbers = torch.arange(len(captioned)).to(owner)
    return {"t2v": _places(scores, owner), "v2t": _places(best.T[captioned][:, captioned], numbers)}


def _places(
    scores: Float[Tensor, "queries items"], own: Int[Tensor, " queries"]
) -> tuple[Int[Tensor, " queries"], Int[Tensor, " queries"]]:
    """Of each query: how many items score above its own one, and how many as much, itself included."""
    mine = scores.gather(1, own[:, None])
    return (scores > mine).sum(dim=1), (scores == mine).sum(dim=1)


def _summary(above: Int[Tensor, " queries"], level: Int[Tensor, " queries"]) -> dict[str, float]:
    """The columns of the table. In a random order of its level an own item has each of the ranks above + 1 to
    above + level equally often. So it is among the first K with probability (K - above) / level, within 0
    and 1, and its expected rank is above + (level + 1) / 2."""
    above, level = above.double(), level.double()
    recall = {f"R@{k}": ((k - above) / level).clamp(0, 1).mean().item() * 100 for k in (1, 5, 10, 50)}
    ranks = above + (level + 1) / 2
    return {**recall, "MdR": ranks.quantile(0.5).item(), "MnR": ranks.mean().item()}


def dual_softmax(scores: Float[Tensor, "texts videos"], scale: float) -> Float[Tensor, "texts videos"]:
    """Each score times the softmax of its column: texts compete for a video first (--dsl).

    scale: 100 in the released code, or the model's 1 / tau. TRANSDUCTIVE: a score depends on all test queries
    at once, which a search engine does not have. Numbers with it do not compare with numbers without."""
    return scores * (scale * scores).softmax(dim=0)


def dsl_scores(
    scores: Float[Tensor, "texts videos"], how: str, scale: float
) -> tuple[Float[Tensor, "texts videos"], Float[Tensor, "texts videos"]]:
    """The scores by which texts rank videos, and those by which videos rank texts, as --dsl says.

    none           the scores themselves
    temperature    dual_softmax over the queries at `scale`, the model's 1 / tau
    released       dual_softmax over the texts at 100 in both directions, as in T-MASS's released code"""
    if how == "released":
        scores = dual_softmax(scores, 100.0)
    if how != "temperature":
        return scores, scores
    return dual_softmax(scores, scale), dual_softmax(scores.T, scale).T


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


def audit(
    scores_fn: Callable[[Tensor, Tensor], Float[Tensor, "texts videos"]],
    text: Shaped[Tensor, "texts *features"],
    frames: Shaped[Tensor, "videos *others"],
    tolerance: float = 1e-3,
    numbered: bool = False,
) -> list[str]:
    """Tests that a score depends on one text and one video alone. Returns the findings; [] if it does.

    scores_fn(text, frames) returns all scores; axis 0 of its inputs is texts and videos. Random features will
    do, 5 to 20 of each. The first n of both are scored, n being the smaller number, and then as follows,
    where no score may move. A finding is one sentence, with the pair whose score moved most.

        unequal gallery    without the last video; without the last text
        edited caption     text 0 or n/2 with its channels reversed: only its own row may move
        permutation        texts in reverse order, videos rotated by one
        cut gallery        each half of the videos
        one query alone    text 0; text n - 1
        batch size         each half of the texts
        ties               one text and one video, 16 times each: no diagonal that is above all others

    tolerance   of a move, as a share of the largest absolute score. Rounding moves scores as well, because
                products of other sizes add in another order: in float32 and 1,000 random models by less than
                1e-5, or 1e-4 where logits of the attention reach 8,000. The released formula's leak moves
                them by 1e-1. For TF32 and half precision take 2e-2. A smaller leak is found only in ties
    numbered    scores_fn draws noise by the numbers of text and video (PairNoise): only checks that keep
                the numbers are made. Other noise must be fixed and shared by all pairs

    Raises ValueError for fewer than 3 texts or videos, and if the first n x n scores are not finite."""
    n = min(len(text), len(frames))
    if n < 3:
        what = f"{len(text)} texts and {len(frames)} videos"
        raise ValueError(f"{what} are too few for an audit: give 3 of each.")
    every, half = [*range(n)], n // 2
    base = _scored(scores_fn, text[every], frames[every])
    if bad := int((~base.isfinite()).sum()):
        raise ValueError(f"{bad} of {base.numel()} scores are NaN or infinite and cannot be audited.")
    plan = [  # name, what is done, texts, videos, the text that is edited
        ("random scores", "called again with the same input", every, every, None),
        ("unequal gallery", f"with {n} texts and {n - 1} videos", every, every[:-1], None),
        ("unequal gallery", f"with {n - 1} texts and {n} videos", every[:-1], every, None),
        *(("edited caption", f"with another text {k}", every, every, k) for k in (0, half)),
        ("permutation", "in another order", every[::-1], [*every[1:], 0], None),
        *(("one query alone", f"with text {k} alone", [k], every, None) for k in (0, n - 1)),
    ]
    for part in (every[:half], every[half:]):
        plan.append(("cut gallery", f"with {len(part)} of {n} videos", every, part, None))
        plan.append(("batch size", f"with {len(part)} of {n} texts at once", part, every, None))
    findings: dict[str, str] = {}
    for name, what, rows, columns, edited in plan:
        keeps_numbers = rows == every[: len(rows)] and columns == every[: len(columns)]
        if name in findings or (numbered and not keeps_numbers):
            continue
        queries = text[rows]
        if edited is not None:
            queries[edited] = queries[edited].flip(-1)
        try:
            found = _scored(scores_fn, queries, frames[columns])
        except Exception as error:  # of any kind: scores_fn is not ours, and this is the finding
            findings[name] = f"{name}: {what}, it raises {_first_line(error)}"
            continue
        before = base[rows][:, columns]
        moved = (found - before).abs()
        if edited is not None:
            moved[edited] = 0
        if not moved.max() <= tolerance * base.abs().max():  # a NaN is a move, and the largest
            i, j = divmod(int(moved.argmax()), len(columns))
            change = f"moves from {before[i, j]:.4g} to {found[i, j]:.4g}"
            findings[name] = f"{name}: {what}, the score of text {rows[i]} and video {columns[j]} {change}."
        if "random scores" in findings:  # the other checks would find this too
            return [*findings.values()]
    try:
        equal = _scored(scores_fn, text[[0] * 16], frames[[0] * 16])
    except Exception as error:
        return [*findings.values(), f"ties: with 16 texts and 16 videos, it raises {_first_line(error)}"]
    own, others = equal.diag(), equal.clone().fill_diagonal_(-torch.inf)
    if (own > others.amax(dim=0)).all() and (own > others.amax(dim=1)).all():
        pairs = f"text 0 and video 0: {own[0]:.9g}, text 0 and video 1: {equal[0, 1]:.9g}"
        findings["ties"] = f"ties: of 16 equal texts and videos, i and i score highest ({pairs})."
    return [*findings.values()]


def _scored(
    scores_fn: Callable, text: Shaped[Tensor, "texts *features"], frames: Shaped[Tensor, "videos *others"]
) -> Float[Tensor, "texts videos"]:
    """What scores_fn returns, in float64 on the CPU. Raises ValueError if it is not of all pairs."""
    found = torch.as_tensor(scores_fn(text, frames)).detach().double().cpu()
    if found.shape != (len(text), len(frames)):
        what = f"{len(text)} texts and {len(frames)} videos"
        raise ValueError(f"{what} gave scores of shape {tuple(found.shape)}.")
    return found


def _first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__} ({(str(error).strip() or 'no message').splitlines()[0]})"
