"""More than recall: pairs, complexity of the clips, uncertainty of the queries ("Experiments").

    further_analysis  cosines and losses of relevant and of irrelevant pairs: the paper's two panels
    query_results     numbers of each query, kept beside a cell's metrics (reproduce.py)
    by_group          recall by number of scenes or by dispersion of the frames, and the gain over a baseline
    first_answers     which clips are the first answers (hubs)
    uncertainty       whether uncertain queries fail: ten levels of uncertainty against R@1, and rejection

Results are {row: {seed: result}} here; a result holds the numbers of each query as strings.
"""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import scipy  # its stats are loaded when they are used
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from engine.controls import dispersion
from engine.intervals import over_seeds, over_seeds_and_clips
from engine.metrics import first_hits, relevance_of_each
from engine.scoring import noise_bank
from losses import cosine_scores
from model import TMASS, Frames, Text, matched, stochastic_text

Results = Mapping[str, Mapping[int, dict]]
PAIRS = ("cosine of irrelevant pairs", "cosine of relevant pairs", "loss of relevant pairs")
# Uncertainties of a query whose first answer is the video j; the last three need no mass.
RADIUS, RELATIVE, SPREAD = "\\|R eps\\|", "\\|R eps\\| / \\|t\\|", "std of the first score over draws"
ENTROPY, COSINE, MARGIN = "entropy of the scores", "- cosine of the first", "- lead of the first"
UNCERTAINTIES = (RADIUS, RELATIVE, SPREAD, ENTROPY, COSINE, MARGIN)
DRAWS, PAIRS_AT_ONCE = 200, 16
LEVELS, REJECTED = 10, np.arange(0, 100, 5)  # levels of uncertainty; per cent of the queries left out
THIRDS = ("low third", "middle third", "high third")
TREND = "last - first"

# -------------------------------------------------------------------------------------- numbers of each query


@torch.no_grad()
def own_pairs(
    model: TMASS, text: Text, frames: Float[Tensor, "texts frames dim"]
) -> tuple[Text, Text | None]:
    """v and R of text i with video i; R is None without a mass. Call model.eval() first."""
    video, radius = [], []
    for t, f in zip(text.split(PAIRS_AT_ONCE), frames.split(PAIRS_AT_ONCE)):
        pooled = model.fusion(t, f)  # of all pairs of a few texts and videos
        video.append(matched(pooled))
        radius += [] if model.radius is None else [matched(model.radius(t, f, pooled))]
    return torch.cat(video), torch.cat(radius) if radius else None


def noise_length(
    radius: Float[Tensor, "*pairs dim"], prior: str = "normal", std: float = 1.0
) -> Float[Tensor, "*pairs"]:
    """|R eps|: the root of its mean square, sqrt(E[eps^2] sum R^2)."""
    return radius.norm(dim=-1) * (std if prior == "normal" else 3**-0.5)


def noise_ratio(model: TMASS, text: Text, frames: Frames, owner: Int[Tensor, " texts"], **prior) -> float:
    """The mean of |R eps| / |t| over the texts, each with its own video."""
    _, radius = own_pairs(model, text, frames[owner])
    return (noise_length(radius, **prior) / text.norm(dim=-1)).mean().item()


@torch.no_grad()
def query_results(
    model: TMASS,
    text: Text,
    frames: Frames,
    owner: Int[Tensor, " texts"],
    scores: Float[Tensor, "texts videos"],
    relevant: Bool[Tensor, "texts videos"] | None = None,
    prior: str = "normal",
    std: float = 1.0,
) -> dict[str, Float[np.ndarray, " _"] | Int[np.ndarray, " _"]]:
    """Numbers of each text, those whose names begin with v2t of each video that has one.

        t2v R@1, R@10, v2t R@1, R@10     100 for a hit, 0 for a miss
        answer                           the number of the first video
        fitting, t2v fits@1 ...          where relevance is known: videos that fit, and relevance_metrics
        UNCERTAINTIES                    those that the model has
        dispersion                       of each video

    prior, std: of eps. The spread is over DRAWS draws, which all pairs share."""
    model.eval()
    found = {f"{way} R@{k}": hits for k in (1, 10) for way, hits in first_hits(scores, owner, k).items()}
    two = scores.topk(min(2, scores.shape[1]), dim=1)
    found["answer"] = answer = two.indices[:, 0]
    if relevant is not None:
        found["fitting"] = relevant.sum(dim=1)
        found |= {f"t2v {name}": x for name, x in relevance_of_each(scores, relevant).items()}
    video, radius = own_pairs(model, text, frames[answer])
    if radius is not None:
        found[RADIUS] = noise_length(radius, prior, std)
        found[RELATIVE] = found[RADIUS] / text.norm(dim=-1)
        noise = noise_bank(DRAWS, text.shape[1], 0, prior, std).to(text)
        found[SPREAD] = torch.cat([_spread(*some, noise) for some in _few(text, radius, video)])
    log_p = (model.logit_scale.exp() * scores).log_softmax(dim=1)
    found[ENTROPY] = -(log_p.exp() * log_p).sum(dim=1)
    found[COSINE] = -F.cosine_similarity(text, video, dim=-1)
    found[MARGIN] = two.values[:, -1] - two.values[:, 0]
    found["dispersion"] = dispersion(frames)
    return {name: x.cpu().numpy() for name, x in found.items()}


def _few(*tensors: Tensor):
    return zip(*(x.split(PAIRS_AT_ONCE) for x in tensors))


def _spread(text: Tensor, radius: Tensor, video: Tensor, noise: Tensor) -> Float[Tensor, " pairs"]:
    """The standard deviation of cos(t_s, v) over the draws, of pairs (t_i, v_i)."""
    t_s = stochastic_text(text, radius[:, None], noise).squeeze(2)  # (draws, pairs, dim)
    return torch.stack([cosine_scores(draw, video[:, None]).squeeze(1) for draw in t_s]).std(dim=0)


def written(numbers: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The numbers of each query as strings, which JSON files keep on one line."""
    return {name: " ".join(f"{x:.6g}" for x in values.tolist()) for name, values in numbers.items()}


def read(results: Mapping[int, dict], name: str, seeds: Sequence[int]) -> Float[np.ndarray, "seeds queries"]:
    """The numbers of each query, of the results of some seeds."""
    return np.array([np.array(results[seed]["queries"][name].split(), float) for seed in seeds])


def numbers_of_each(result: dict, name: str) -> list[str]:
    """Returns a metric of each query; [] if it is not known."""
    hits = {f"{way} R@1": numbers for way, numbers in result["first hits"].items()}
    return (hits | result.get("queries", {})).get(name, "").split()


def clips_of(result: dict, metric: str) -> Int[np.ndarray, " queries"]:
    """The clip of each query of a metric: of a caption (t2v), or the clip itself (v2t)."""
    owner = np.array(result["owner"].split(), int)
    return np.unique(owner) if metric.startswith("v2t") else owner


# -------------------------------------------------------------------------- relevant and irrelevant pairs

# Bin edges of the histograms; the outer bins also count the values beyond them.
EDGES = dict(zip(PAIRS, (np.linspace(-0.5, 1, 76), np.linspace(-0.5, 1, 76), np.linspace(0, 15, 76))))


def further_analysis(scores: Float[Tensor, "n n"], scale: float, batch: int) -> dict:
    """Returns the quantities of the paper's two panels, each as mean and histogram in per cent.

        cosine of irrelevant pairs   s_ij, i != j               text i belongs to video i
        cosine of relevant pairs     s_ii
        loss of relevant pairs       - (log softmax_j(scale s_ij)[i] + log softmax_j(scale s_ji)[i]) / 2

    The softmax runs over batches of neighbours, as in training."""
    n, size = len(scores), min(batch, len(scores))
    irrelevant = scores[~torch.eye(n, dtype=torch.bool, device=scores.device)]
    blocks = [scale * scores[k : k + size, k : k + size] for k in range(0, n - size + 1, size)]
    losses = torch.cat([-(b.log_softmax(1).diag() + b.log_softmax(0).diag()) / 2 for b in blocks])
    panels = {}
    for name, values in zip(PAIRS, (irrelevant, scores.diag(), losses)):
        edges = EDGES[name]
        counts, _ = np.histogram(values.double().clamp(edges[0], edges[-1]).cpu().numpy(), edges)
        panels[name] = {"mean": values.mean().item(), "share": (100 * counts / len(values)).tolist()}
    return panels


# ----------------------------------------------------------------------------------------- text in the tables


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Returns "mean ± std" over seeds."""
    if not values:
        return "not run"
    std = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{std}"


def with_intervals(found: Mapping | None, digits: int = 1) -> str:
    """Returns "mean [over seeds] ([over seeds and clips])" of a difference."""
    if found is None:
        return "-"
    mean, half, clips = found["mean"], found["half"], found.get("clips")
    over = "" if half is None else f" [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"
    both = "" if clips is None else f" ([{clips[0]:+.{digits}f}, {clips[1]:+.{digits}f}])"
    return f"{mean:+.{digits}f}{over}{both}"


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Returns a markdown table; the first line is its head."""
    head, *rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, f"|---|{'---:|' * (len(lines[0]) - 1)}", *rows])


# ------------------------------------------------------------------------------------------------- complexity


def thirds(values: Float[np.ndarray, " clips"]) -> Int[np.ndarray, " clips"]:
    """0, 1 or 2: the third of the clips in which a value lies, from low to high."""
    return np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values, side="right")


def gain(
    values: Float[np.ndarray, "seeds queries"],
    baseline: Float[np.ndarray, "seeds queries"],
    clip: Int[np.ndarray, " queries"],
) -> dict | None:
    """The mean of values - baseline with both intervals: over_seeds, and "clips". None without a query."""
    if not values.size:
        return None
    both = (dict(enumerate(x.mean(axis=1).tolist())) for x in (values, baseline))
    enough = len(np.unique(clip)) > 1
    return {**over_seeds(*both), "clips": over_seeds_and_clips(values, baseline, clip) if enough else None}


def by_group(
    results: Results, metric: str, group: Int[np.ndarray, " clips"], labels: Sequence[str]
) -> dict[str, dict]:
    """{row: {"values": {label: {seed: mean}}, "gains": {label: gain}}}; the first row is the baseline.

    metric: a name of query_results. group: of each clip, the number of its label. gains[TREND]: the gain in
    the last group minus that in the first, which says whether the gain grows."""
    base, *_ = results.values()
    content: dict[str, dict] = {}
    for row, found in results.items():
        content[row] = {"values": {label: {} for label in labels}, "gains": {}}
        if not found:
            continue
        seeds, clip = sorted(found), clips_of(next(iter(found.values())), metric)
        of_query, x = group[clip], read(found, metric, seeds)
        for number, label in enumerate(labels):
            means = x[:, of_query == number].mean(axis=1) if (of_query == number).any() else []
            content[row]["values"][label] = dict(zip(seeds, map(float, means)))
        common = sorted(found.keys() & base.keys())
        if found is base or not common:
            continue
        x, b = read(found, metric, common), read(base, metric, common)
        inside = [of_query == number for number in range(len(labels))]
        for label, own in zip(labels, inside):
            content[row]["gains"][label] = gain(x[:, own], b[:, own], clip[own])
        if inside[0].any() and inside[-1].any():  # weights whose mean is the difference of two group means
            weight = inside[-1] / inside[-1].mean() - inside[0] / inside[0].mean()
            content[row]["gains"][TREND] = gain(x * weight, b * weight, clip)
    return content


def group_table(metric: str, content: Mapping[str, dict], labels: Sequence[str]) -> str:
    """Returns the table of `by_group`: values of all rows, then gains over the first."""
    base = next(iter(content))
    lines = [[f"{metric}", *labels, f"gain, {TREND}"]]
    for row, found in content.items():
        seen = [[*found["values"][label].values()] for label in labels]
        lines.append([row, *(spread(x) if x or not any(seen) else "-" for x in seen), ""])
    for row, found in content.items():
        if row != base:
            gains = (with_intervals(found["gains"].get(label)) for label in (*labels, TREND))
            lines.append([f"{row}: gain over {base}", *gains])
    return markdown_table(lines)


def first_answers(
    results: Results, group: Int[np.ndarray, " clips"], labels: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """{row: {label: per cent of the first answers that are clips of this group, of each seed}}; and "clips":
    that of the clips themselves."""
    content = {"clips": {label: [float((group == n).mean() * 100)] for n, label in enumerate(labels)}}
    for row, found in results.items():
        answers = read(found, "answer", sorted(found)).astype(int)
        content[row] = {label: [] for label in labels}
        for number, label in enumerate(labels) if found else ():
            content[row][label] = ((group[answers] == number).mean(axis=1) * 100).tolist()
    return content


def complexity(results: Results, more: Results, scenes: Int[np.ndarray, " clips"] | None) -> tuple[dict, str]:
    """Recall by complexity of the query's clip: the content of a JSON file, and markdown.

    results: on the test clips, by thirds of dispersion. more: on clips of several numbers of scenes."""
    content, parts = {}, []
    known = [result for found in results.values() for result in found.values()]
    if known:
        group = thirds(np.array(known[0]["queries"]["dispersion"].split(), float))
        content["first answers"] = shares = first_answers(results, group, THIRDS)
        lines = [["first answers, % that are clips of", *THIRDS]]
        lines += [[row, *(spread(found[label]) for label in THIRDS)] for row, found in shares.items()]
        parts.append(markdown_table(lines))
        content["dispersion"] = _groups(results, group, THIRDS, "by dispersion of the clip's frames", parts)
    if scenes is not None and any(more.values()):
        numbers = np.unique(scenes)
        labels = [f"{n} scene{'s' if n > 1 else ''}" for n in numbers.tolist()]
        group = np.searchsorted(numbers, scenes)
        content["scenes"] = _groups(more, group, labels, "by number of scenes of the clip", parts)
    return content, "\n\n".join(parts)


def _groups(results: Results, group: np.ndarray, labels: Sequence[str], how: str, parts: list[str]) -> dict:
    """by_group of all metrics; adds the tables to `parts`, and the best possible R@1 where it is known."""
    content = {}
    known = next((result for found in results.values() for result in found.values()), {"queries": {}})
    for metric in ("t2v R@1", "v2t R@1", "t2v R@10", "v2t R@10", "t2v fits@1"):
        if metric not in known["queries"]:
            continue
        content[metric] = by_group(results, metric, group, labels)
        parts.append(group_table(f"{metric} {how}", content[metric], labels))
    if "fitting" in known["queries"]:
        of_query = group[clips_of(known, "t2v")]
        best = 100 / np.array(known["queries"]["fitting"].split(), float)
        means = [float(best[of_query == n].mean()) for n in range(len(labels))]
        content["perfect retriever"] = dict(zip(labels, means))
        each = ", ".join(f"{label} {mean:.1f}" for label, mean in zip(labels, means))
        parts.append(f"t2v R@1 of a perfect retriever {how}: {each}.")
    return content


def lines_by_scenes(
    content: Mapping[str, Mapping],
) -> tuple[dict[str, dict[str, list[float]]], tuple[str, ...], dict[str, int]]:
    """The rows, metrics and x of a figure of recall by number of scenes (plot_rows), from `complexity`."""
    metrics, rows, x = ("t2v R@1", "v2t R@1"), {}, {}
    for row, found in content[metrics[0]].items():
        for label in found["values"]:
            name = f"{row}, scenes = {label.split()[0]}"
            rows[name] = {metric: [*content[metric][row]["values"][label].values()] for metric in metrics}
            x[name] = int(label.split()[0])
    return rows, metrics, x


# ------------------------------------------------------------------------------------------------ uncertainty


def _untied(
    uncertain: Float[np.ndarray, " queries"], hits: Float[np.ndarray, " queries"]
) -> Float[np.ndarray, " queries"]:
    """The hits from the most certain to the least; queries of equal uncertainty have their mean."""
    _, level = np.unique(uncertain, return_inverse=True)
    means = np.bincount(level, hits) / np.bincount(level)
    return means[np.sort(level)]


def levels(uncertain: Float[np.ndarray, " queries"], hits: Float[np.ndarray, " queries"]) -> dict:
    """R@1 of ten levels of uncertainty with equally many queries, and how well they agree.

        S        Spearman's correlation of level (1 to 10) and R@1: -1 where R@1 falls from level to level
        R2       of a straight line through the ten
        -S R2    1 is best (the numbers of Upadhyay et al., ProbVLM, ICCV 2023)

    All are 0 where R@1 is the same in all levels."""
    bins = np.array([part.mean() for part in np.array_split(_untied(uncertain, hits), LEVELS) if len(part)])
    if np.ptp(bins) < 1e-9:
        return {"levels": bins.tolist(), "S": 0.0, "R2": 0.0, "-S R2": 0.0}
    number = np.arange(len(bins))
    S, R2 = float(scipy.stats.spearmanr(number, bins)[0]), float(scipy.stats.pearsonr(number, bins)[0] ** 2)
    return {"levels": bins.tolist(), "S": S, "R2": R2, "-S R2": -S * R2}


def rejection(uncertain: Float[np.ndarray, " queries"], hits: Float[np.ndarray, " queries"]) -> dict:
    """R@1 of the queries that are left without the most uncertain 0, 5 ... 95 %, and its mean ("area")."""
    ordered = _untied(uncertain, hits)
    kept = np.ceil(len(ordered) * (100 - REJECTED) / 100).astype(int)
    curve = (ordered.cumsum() / np.arange(1, len(ordered) + 1))[kept - 1]
    return {"rejection": curve.tolist(), "area": float(curve.mean())}


def uncertainty(results: Results) -> tuple[dict, str]:
    """For each row and measure, of each seed: levels, rejection, the same where any clip that fits is a hit,
    and "fitting": Spearman's correlation, over queries, with the number of clips that fit. The uncertainties
    "none" and "best possible" are the limits. Returns the content of a JSON file, and markdown."""
    content: dict[str, dict[str, dict]] = {}
    for row, found in results.items():
        content[row] = {}
        for seed, result in found.items():
            queries = {name: np.array(line.split(), float) for name, line in result["queries"].items()}
            hits = queries["t2v R@1"]
            perfect = {"best possible": -hits, "none": np.zeros(len(hits))}
            for name, uncertain in (queries | perfect).items():
                if name not in (*UNCERTAINTIES, *perfect):
                    continue
                numbers = levels(uncertain, hits) | rejection(uncertain, hits)
                if "t2v fits@1" in queries:
                    other = levels(uncertain, queries["t2v fits@1"])["-S R2"]
                    area = rejection(uncertain, queries["t2v fits@1"])["area"]
                    numbers |= {"fits -S R2": other, "fits area": area}
                if "fitting" in queries and np.ptp(uncertain) > 0 and np.ptp(queries["fitting"]) > 0:
                    numbers["fitting"] = float(scipy.stats.spearmanr(uncertain, queries["fitting"])[0])
                content[row].setdefault(name, {})[seed] = numbers
    head = ["", "uncertainty", "S", "R²", "-S R²", "mean R@1 under rejection", "-S R² of fits@1"]
    lines = [[*head, "mean fits@1 under rejection", "Spearman with fitting clips"]]
    columns = [("S", 2), ("R2", 2), ("-S R2", 2), ("area", 1), ("fits -S R2", 2), ("fits area", 1)]
    columns += [("fitting", 2)]
    for row, measures in content.items():
        for name, seeds in measures.items():
            found = [[x[key] for x in seeds.values() if key in x] for key, _ in columns]
            cells = [spread(x, digits) if x else "-" for x, (_, digits) in zip(found, columns)]
            blank = ["", "", "", cells[3], "", cells[5] if name == "none" else "", ""]
            shown = cells if name in UNCERTAINTIES else blank
            lines.append([row, name, *shown])
    return content, markdown_table(lines)
