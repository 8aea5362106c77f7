"""Pictures: retrieved clips, ranks, training curves, and the figures of reproduce.py.

Every function takes plain numbers and writes one PNG file atomically. It raises OSError if it cannot."""

import functools
import statistics
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from engine.files import printable, write_atomic

Number = int | float
BLUE, ORANGE, GREEN = "#0072b2", "#e69f00", "#009e73"
# Fonts of many scripts, on Linux, macOS and Windows.
SCRIPTS = ["Noto Sans CJK SC", "Noto Sans CJK JP", "Arial Unicode MS", "Microsoft YaHei", "Noto Sans"]


def new_figure(**options):
    """An empty matplotlib Figure; matplotlib is imported here, since few commands draw."""
    from matplotlib.figure import Figure  # not pyplot, whose global state belongs to notebooks

    return Figure(**options)


def save(figure, path: Path, dpi: int = 110, **options) -> None:
    """Writes a figure as PNG, atomically; `options` are those of Figure.savefig. Raises OSError.

    All text is drawn as it is: two dollar signs in a caption are no formula. A character that no font has is
    drawn as a box."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    plain = {"text.parse_math": False, "text.usetex": False}
    for text in figure.findobj(Text):
        text.set(parse_math=False, usetex=False)
        text.set_fontfamily([*text.get_fontfamily(), *_fallback_fonts()])
    with rc_context(plain), warnings.catch_warnings():  # the context is for tick labels, made while drawing
        warnings.filterwarnings("ignore", "Glyph .* missing")
        write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=dpi, **options))


@functools.cache
def _fallback_fonts() -> tuple[str, ...]:
    """The fonts with many scripts that this machine has, for what matplotlib's own font lacks."""
    from matplotlib.font_manager import fontManager

    known = set(fontManager.get_font_names())
    return tuple(name for name in SCRIPTS if name in known)


def wrap(caption: str, width: int = 30, lines: int = 4) -> str:
    """A caption in at most so many lines. Wide characters, such as Chinese ones, count twice."""
    wide = any(unicodedata.east_asian_width(character) in "WF" for character in caption)
    words = " ".join(printable(caption).split())
    return textwrap.fill(words, width // 2 if wide else width, max_lines=lines)


# ------------------------------------------------------------------------------------------------- evaluation


def contact_sheet(
    path: Path,
    scores: Float[Tensor, "texts videos"],
    owner: Int[Tensor, " texts"],
    captions: Sequence[str],
    frames_of: Callable[[int], np.ndarray],
    relevant: Bool[Tensor, "texts videos"] | None = None,
    queries: int = 6,
    shown: int = 5,
    seed: int = 0,
) -> None:
    """Draws random captions, one a row, and the clips that rank first for each, three frames a clip.

    The caption's own clip has a green frame; its rank is below the caption. `seed` draws the captions.
    owner: the video that each text describes. frames_of(video): its frames, (frames, height, width, 3).
    relevant: every clip that fits each caption, if it is known; these have a dashed frame."""
    from matplotlib.patches import Rectangle

    videos = scores.shape[1]
    chosen = np.sort(np.random.default_rng(seed).permutation(len(captions))[:queries])
    shown = min(shown, videos)
    figure = new_figure(figsize=(2.7 * (shown + 1), 1.15 * len(chosen)))
    grid = dict(width_ratios=[1.15] + [1] * shown, wspace=0.05, hspace=0.18)
    axes = figure.subplots(len(chosen), shown + 1, squeeze=False, gridspec_kw=grid)
    for row, text in zip(axes, chosen):
        own = int(owner[text])
        order = scores[text].argsort(descending=True, stable=True).tolist()
        rank = f"own clip: rank {order.index(own) + 1} of {videos}"
        row[0].text(0, 0.5, f"{wrap(captions[text])}\n", fontsize=9.5, va="center")
        row[0].text(0, 0, rank, fontsize=8, color="0.4", va="bottom")
        for axis, video in zip(row[1:], order):
            axis.imshow(_strip(frames_of(video)))
            if video == own or (relevant is not None and relevant[text, video]):
                style = dict(fill=False, linewidth=5, linestyle="-" if video == own else (0, (2, 1.2)))
                axis.add_patch(Rectangle((0, 0), 1, 1, color=GREEN, transform=axis.transAxes, **style))
    for axis in axes.flat:
        axis.axis("off")
    for rank, axis in enumerate(axes[0, 1:], start=1):
        axis.set_title(f"rank {rank}", fontsize=9)
    save(figure, path, bbox_inches="tight")


def _strip(frames: np.ndarray) -> np.ndarray:
    """Returns the centre squares of three frames, evenly spaced in time, side by side."""
    count, height, width = frames.shape[:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    picked = [frames[(2 * k + 1) * count // 6] for k in range(3)]  # the midpoints of three segments
    return np.concatenate([frame[top : top + side, left : left + side] for frame in picked], axis=1)


def rank_histogram(path: Path, ranks: Float[Tensor, " texts"], videos: int) -> None:
    """Draws the distribution of the rank of each caption's own clip, and that of a random order."""
    from matplotlib.ticker import LogFormatter

    edges = np.unique(np.geomspace(1, videos + 1, 25).round())
    counts, _ = np.histogram(ranks.cpu().numpy(), edges)
    figure = new_figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.stairs(100 * counts / len(ranks), edges, fill=True, color=BLUE, label="captions")
    axis.stairs(100 * np.diff(edges) / videos, edges, color=ORANGE, lw=2, label="chance")
    axis.set(xscale="log", xlabel="rank of the caption's own clip", ylabel="% of captions")
    axis.set(title=f"{len(ranks)} captions, {videos} clips")
    axis.xaxis.set_major_formatter(LogFormatter())  # 1, 10, 100: matplotlib's own are formulas
    axis.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    axis.legend()
    save(figure, path)


# --------------------------------------------------------------------------------------------------- training


def plot_losses(path: Path, rows: Sequence[dict]) -> None:
    """Draws the loss and its parts, and recall on validation, from the rows of metrics.jsonl."""
    steps = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "val" in row]
    figure = new_figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    parts = list(dict.fromkeys(name for row in steps for name in row if name.startswith("L_")))
    for name in ["loss", *(parts if parts != ["L_ce"] else [])]:  # L_ce alone is the loss
        found = [(row["step"], row[name]) for row in steps if name in row]
        if found:
            left.plot(*zip(*found), label=name)
    left.set(xlabel="step", ylabel="loss", title="training")
    if steps:
        left.legend()
    for name in ("R@1", "R@5", "R@10"):
        recall = [row["val"]["t2v"][name] for row in validations]
        right.plot([row["step"] for row in validations], recall, "o-", label=name)
    right.set(xlabel="step", ylabel="text-to-video, % of queries", title="validation", ylim=(0, 100))
    right.legend()
    save(figure, path, dpi=120)


# ----------------------------------------------------------------------------------------------- reproduce.py


def plot_rows(
    path: Path,
    rows: Mapping[str, Mapping[str, Sequence[Number]]],
    metrics: Sequence[str],
    x: Mapping[str, Number] | None = None,
    axis: str | None = None,
    log: bool = False,
) -> None:
    """Draws a table, one panel a metric: {row: {metric: values over seeds}}. Leaves out rows without values.

    Without `axis`: a dot for each seed and a bar at their mean, one row above the other.
    axis    the name of the x axis, log: logarithmic; x: the place of each row on it. Draws mean and std over
            seeds, one line for each text before "AXIS = " in the names of the rows."""
    figure, panels = _panels(len(metrics))
    for number, (panel, metric) in enumerate(zip(panels, metrics)):
        found = {name: list(row[metric]) for name, row in rows.items() if row.get(metric)}
        if axis is None:
            for y, values in enumerate(found.values()):
                panel.plot(values, [y] * len(values), "o", alpha=0.4, color=f"C{y}")
                panel.plot(statistics.mean(values), y, "|", ms=18, mew=2, color=f"C{y}")
            panel.set(yticks=range(len(found)), yticklabels=[] if number else list(found), xlabel=metric)
            panel.invert_yaxis()
            continue
        lines: dict[str, list[str]] = {}
        for name in found:
            label = name.rpartition(f"{axis} = ")[0].strip(", ") or "T-MASS, paper"
            lines.setdefault(label, []).append(name)
        for label, names in lines.items():
            mean = [statistics.mean(found[name]) for name in names]
            std = [statistics.stdev(found[name]) if len(found[name]) > 1 else 0 for name in names]
            panel.errorbar([x[name] for name in names], mean, std, fmt="o-", capsize=3, label=label)
        panel.set(xlabel=axis, ylabel=metric, xscale="log" if log else "linear")
        if log:  # 0.1, 1: matplotlib's own labels are formulas
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter("")
    _finish(figure, path)


def plot_histograms(
    path: Path, panels: Mapping[str, Mapping[str, Sequence[Number]]], edges: Mapping[str, np.ndarray]
) -> None:
    """Draws distributions: {panel: {row: per cent in each bin}}, with the bin edges of each panel."""
    figure, axes = _panels(len(panels))
    for axis, (name, rows) in zip(axes, panels.items()):
        for row, share in rows.items():
            axis.stairs(np.asarray(share, float), edges[name], label=row)
        axis.set(xlabel=name, ylabel="%")
    _finish(figure, path)


def plot_uncertainty(path: Path, rows: Mapping[str, Mapping[str, Mapping[Hashable, dict]]]) -> None:
    """Draws {row: {uncertainty: {seed: {"levels": R@1, "rejection": R@1}}}}, means over seeds, a column for
    each row: above R@1 by level of uncertainty, below R@1 of the queries that are left."""
    shown = {row: measures for row, measures in rows.items() if measures}
    figure = new_figure(figsize=(4.5 * max(len(shown), 1), 6.8), layout="constrained")
    axes = figure.subplots(2, max(len(shown), 1), squeeze=False, sharey="row")
    for (above, below), (row, measures) in zip(axes.T, shown.items()):
        for name, seeds in measures.items():
            bins, curve = (
                np.mean([x[key] for x in seeds.values()], axis=0) for key in ("levels", "rejection")
            )
            label = name.replace("\\", "")
            if name not in ("best possible", "none"):
                above.plot(np.arange(len(bins)) + 1, bins, "o-", ms=3, label=label)
                below.plot(100 * np.arange(len(curve)) / len(curve), curve, label=label)
            else:
                below.plot(100 * np.arange(len(curve)) / len(curve), curve, ":", color="0.5")
        above.set(title=row, xlabel="level of uncertainty", ylabel="t2v R@1")
        below.set(xlabel="% of the captions left out", ylabel="t2v R@1 of the others")
        above.legend(fontsize=7)
    save(figure, path)


def plot_curves(
    path: Path, curves: Mapping[str, Mapping[str, Mapping[Hashable, Sequence[Sequence[Number]]]]]
) -> None:
    """Draws training curves: {row: {panel: {seed: [(step, value), ...]}}}.

    Seeds are thin lines, their mean a thick one. It is left out if they have different numbers of points."""
    figure, axes = _panels(max((len(panels) for panels in curves.values()), default=1))
    for number, (row, panels) in enumerate(curves.items()):
        for axis, (name, seeds) in zip(axes, panels.items()):
            lines = [np.array(points, float) for points in seeds.values() if len(points)]
            for line in lines:
                axis.plot(*line.T, color=f"C{number}", lw=0.5, alpha=0.5)
            if lines and len({line.shape for line in lines}) == 1:
                style = "-" if name == "training loss" else "o-"
                axis.plot(*np.mean(lines, axis=0).T, style, color=f"C{number}", label=row)
            axis.set(xlabel="step", ylabel=name)
    _finish(figure, path)


def _panels(count: int) -> tuple:
    figure = new_figure(figsize=(4.5 * count, 3.4), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _finish(figure, path: Path) -> None:
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.axes[0].legend(fontsize=8)
    save(figure, path)
