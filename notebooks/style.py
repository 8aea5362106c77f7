"""The plots of the notebooks. The cells compute; the functions here only draw the arrays that they get.

A colour has one meaning in all notebooks. The set is Okabe and Ito's: colour-blind readers can tell its
colours apart, and their greys differ in print. Most functions take `series`, a dict from label to values and
colour. They draw on `axis`, or on a new figure of `size` (width, height in inches). `legend` is a place, or
"outside". Further keywords go to matplotlib's axis.set.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes

TEXT, DRAW, SUPPORT = "#0072b2", "#e69f00", "#d55e00"  # t; t_s; t_sup, and also: a wrong result, a slow way
MATCH, OTHER = "#009e73", "#8c8c8c"  # the matching clip, and also: a right result; other clips
SKY, PINK, BLACK = "#56b4e9", "#cc79a7", "#1a1a1a"

plt.rcParams.update(
    {
        "figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 9.5, "axes.titlesize": 10,
        "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=[TEXT, DRAW, MATCH, PINK, SUPPORT, SKY]), "lines.linewidth": 1.8,
        "legend.frameon": False, "legend.fontsize": 8.5, "image.cmap": "cividis",
    }
)  # fmt: skip

# ---- figures


def panels(rows: int, columns: int, size: tuple[float, float], **options) -> np.ndarray:
    """Axes of a new figure of several plots, row by row, (rows * columns,). Options: see plt.subplots."""
    return plt.subplots(rows, columns, figsize=size, **options)[1].ravel()


def key_figure(name: str) -> None:
    """Saves the last figure as TMASS_FIGURES/NAME.png, if that variable is set (`make figures`)."""
    if folder := os.environ.get("TMASS_FIGURES"):
        path, figure = Path(folder) / f"{name}.png", plt.gcf()
        figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
        figure.set_layout_engine("none")  # the layout is done; the notebook shows the same figure


def _open(axis: Axes | None, size: tuple[float, float]) -> Axes:
    return plt.subplots(figsize=size)[1] if axis is None else axis


def _finish(axis: Axes, legend: str | None, options: dict) -> None:
    """Sets the options, labels the ticks of a logarithmic x axis, and adds a legend for labelled series."""
    axis.set(**options)
    if options.get("xscale") == "log" and "xticks" in options:
        axis.set_xticks(options["xticks"], options["xticks"])
        axis.minorticks_off()
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(
            **(dict(loc="upper left", bbox_to_anchor=(1, 1)) if legend == "outside" else dict(loc=legend))
        )


# ---- clips


def strip(pictures: Sequence[np.ndarray], title: str = "", axis: Axes | None = None) -> None:
    """The frames of a clip side by side. Frame k is centred at x = k, so a plot below can share the axis."""
    axis = _open(axis, (8.4, 0.75 + 0.25 * bool(title)))
    padded = [np.pad(picture, ((0, 0), (2, 2), (0, 0)), constant_values=255) for picture in pictures]
    axis.imshow(np.concatenate(padded, axis=1), extent=(-0.5, len(pictures) - 0.5, 0, 1), aspect="auto")
    axis.set(xlim=(-0.5, len(pictures) - 0.5), title=title)
    axis.axis("off")


def thumbnail(pictures: Sequence[np.ndarray], axis: Axes, frame: str | None = None, line: str = "-") -> None:
    """One picture for a clip: frames of its start, middle and end, with a border of the colour `frame`."""
    axis.imshow(np.concatenate([pictures[k * len(pictures) // 12] for k in (1, 5, 10)], axis=1))
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=frame is not None, color=frame, linewidth=4, linestyle=line)


def strips(clips: dict[str, Sequence[np.ndarray]], size: tuple[float, float] = (8.4, 1.9)) -> None:
    """The frames of several clips, {title: pictures}, one clip a row."""
    for (title, pictures), axis in zip(clips.items(), panels(len(clips), 1, size)):
        strip(pictures, title, axis)


def segments(pictures: Sequence[np.ndarray], chosen: Sequence[int], title: str) -> None:
    """All frames of a clip, a bar under each of its equal segments, and a dot under each chosen frame."""
    axis = _open(None, (8.4, 1.0))
    strip(pictures, title, axis)
    for k, frame in enumerate(chosen):
        ends = np.array([k, k + 1]) * len(pictures) / len(chosen) + (-0.3, -0.7)
        axis.plot(ends, [-0.15, -0.15], color=OTHER, lw=3)
        axis.plot(frame, -0.4, "o", ms=5, color=MATCH)
    axis.set_ylim(-0.55, 1)


def preprocessing(frame: np.ndarray, small: np.ndarray, channels: np.ndarray) -> None:
    """A frame, the resized frame, and its three normalised channels."""
    axes = panels(1, 5, (8.4, 1.9))
    shown = [axes[0].imshow(frame), axes[1].imshow(small)]
    limits = dict(vmin=channels.min(), vmax=channels.max())
    shown += [axis.imshow(channel, **limits) for axis, channel in zip(axes[2:], channels)]
    for axis, name in zip(axes, (f"{len(frame)} px", f"{len(small)} px", "red", "green", "blue, normalised")):
        axis.set(title=name, xticks=[], yticks=[])
    plt.colorbar(shown[-1], ax=axes[4], fraction=0.05)


def bars_under_frames(pictures, series, title="", level=None, axes=None, size=(8.4, 1.9), **options) -> None:
    """The frames of a clip, and under each its bars, {label: (values, colour)}. `level`: a dotted line."""
    above, below = panels(2, 1, size, height_ratios=(1, 1.3)) if axes is None else axes
    strip(pictures, title, above)
    levels = {"_": (level, BLACK)} if level else None
    bars(series, [], axis=below, levels=levels, xlim=(-0.5, len(pictures) - 0.5), xticks=[], **options)
    if not level:
        below.axhline(0, color="k", lw=0.8)


def attention_of_captions(pictures, weights, captions: Sequence[str], title: str, level: float) -> None:
    """The frames of a clip, and under them one row of bars for each caption: weights (captions, frames)."""
    axes = panels(1 + len(captions), 1, (7.6, 4.6), height_ratios=(1.3, *[1] * len(captions)), sharex=True)
    strip(pictures, title, axes[0])
    for axis, row, caption in zip(axes[1:], np.asarray(weights), captions):
        axis.bar(range(len(row)), row, width=0.85, color=MATCH)
        axis.axhline(level, color="k", ls=":", lw=1)
        axis.set(ylim=(0, 1.15 * float(np.max(np.asarray(weights)))), yticks=[], xticks=[])
        axis.set_title(caption, fontsize=8.5, pad=2)
        axis.spines.left.set_visible(False)


def heat_under_frames(
    pictures, matrix, names, size, height=3, label=None, numbers=None, columns=None, **options
) -> None:
    """The frames of a clip, and under each its column of a matrix (names, frames), `height` times as high."""
    above, below = panels(2, 1, size, height_ratios=(1, height))
    strip(pictures, "", above)
    image = heat(below, matrix, names, columns, numbers, aspect="auto")
    below.set(**options)
    below.tick_params(labelsize=8.5)
    if label:
        plt.colorbar(image, ax=below, label=label, orientation="horizontal", fraction=0.06, aspect=50)


def retrieved(rows, titles: Sequence[str] = (), size: tuple[float, float] = (9.6, 3.9)) -> None:
    """Queries and the clips found for them. A row: (query, note, pictures of each clip, is each right).

    A right clip has a border, dashed for "fits": it shows what the query says, but is not the query's own."""
    found = len(rows[0][2])
    axes = plt.subplots(len(rows), 1 + found, figsize=size, width_ratios=(1.25, *[1] * found))[1]
    for line, (query, note, clips, right) in zip(axes, rows):
        line[0].text(0, 0.5, f"{query}\n", fontsize=8, va="center")
        line[0].text(0, 0, note, fontsize=7.5, color="0.4")
        line[0].axis("off")
        for axis, pictures, is_right in zip(line[1:], clips, right):
            thumbnail(pictures, axis, MATCH if is_right else None, "--" if is_right == "fits" else "-")
    for axis, title in zip(axes[0, 1:], titles):
        axis.set_title(title, fontsize=9)


# ---- matrices


def heat(axis: Axes, matrix, rows=None, columns=None, numbers: str | None = None, **options):
    """A heat map with names on its axes; `numbers`, such as ".2f", prints the values. Returns the image."""
    matrix = np.asarray(matrix)
    image = axis.imshow(matrix, aspect=options.pop("aspect", "equal"), **options)
    for ticks, names in ((axis.set_xticks, columns), (axis.set_yticks, rows)):
        ticks(range(len(names)) if names is not None else [], names if names is not None else [])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for (y, x), value in np.ndenumerate(matrix) if numbers else ():
        dark = image.norm(value) < 0.5
        colour = "white" if dark else "black"
        axis.text(x, y, format(value, numbers), ha="center", va="center", fontsize=8, color=colour)
    return image


def probabilities(matrix, axis: Axes, title: str, **options) -> None:
    """A heat map of values between 0 and 1, with a colour bar."""
    plt.colorbar(heat(axis, matrix, vmin=0, vmax=1), ax=axis, fraction=0.05)
    axis.set(title=title, **options)


def heat_maps(
    matrices, names=(None, None), numbers=None, label=None, title=None, size=(7.4, 3.4), scale=None, **options
) -> None:
    """Matrices {title: matrix} side by side, with names (of rows, of columns). They share the range of
    colours `scale` (low, high), which `label` names. With a label its default is the range of all values."""
    axes, cmap = panels(1, len(matrices), size), options.pop("cmap", None)
    if label and scale is None:
        values = np.concatenate([np.ravel(np.asarray(matrix)) for matrix in matrices.values()])
        scale = values.min(), values.max()
    low, high = scale or (None, None)
    for axis, (name, matrix) in zip(axes, matrices.items()):
        image = heat(axis, matrix, *names, numbers, vmin=low, vmax=high, cmap=cmap)
        axis.set(title=name, **options)
        axis.tick_params(axis="x", rotation=90 if names[1] and max(map(len, names[1])) > 5 else 0)
        if scale is None and not numbers:
            plt.colorbar(image, ax=axis, fraction=0.05)
    for axis in axes[1:]:
        axis.set_ylabel("")
    if label:
        plt.colorbar(image, ax=list(axes), label=label)
    if title:
        axes[0].figure.suptitle(title, x=0.02, ha="left", fontsize=10)


# ---- two channels of the joint space


def vectors(arrows, clouds=None, axis=None, title="", legend="outside", size=(5.6, 3.8), **options) -> None:
    """Two channels of the joint space, with the same unit on both axes: arrows {label: (points, colour)} from
    the origin, and clouds {label: (points, colour, marker)}. Points are (n, 2)."""
    axis = _open(axis, size)
    axis.axhline(0, color="0.9", lw=1, zorder=0)
    axis.axvline(0, color="0.9", lw=1, zorder=0)
    for label, (points, colour, marker) in (clouds or {}).items():
        large = {"*": dict(ms=14, mec="k", zorder=5), "o": dict(ms=6, zorder=5)}
        axis.plot(
            *np.asarray(points).T,
            marker,
            color=colour,
            label=label,
            **large.get(marker, dict(ms=3.5, mew=0.8)),
        )
    for label, (points, colour) in arrows.items():
        for k, (x, y) in enumerate(np.asarray(points)):
            arrow = dict(arrowstyle="-|>", color=colour, lw=1.8, shrinkA=0, shrinkB=0)
            axis.annotate("", (x, y), (0, 0), arrowprops=arrow)
            axis.plot(x, y, ".", color=colour, label=label if k == 0 else None)
    labels = dict(aspect="equal", xlabel="first channel", ylabel="second channel", title=title)
    _finish(axis, legend, {**labels, **options})


# ---- series


def _lines(axis: Axes, levels, marks, span) -> None:
    """Levels {label: (y, colour)}, vertical marks {label: (x, colour, line)}, a grey span (x, x, label)."""
    for label, (value, colour) in (levels or {}).items():
        axis.axhline(float(value), color=colour, ls=":", lw=1.2, label=label)
    for label, (value, colour, line) in (marks or {}).items():
        axis.axvline(float(value), color=colour, ls=line, label=label)
    if span:
        axis.axvspan(float(span[0]), float(span[1]), color="0.85", zorder=0, label=span[2])


def curves(
    series, levels=None, marks=None, span=None, axis=None, size=(5.6, 2.6), legend="best", **options
) -> None:
    """Curves {label: (x, y, colour, line)}; line: "-", "--", "o-", a marker alone. For levels see _lines."""
    axis = _open(axis, size)
    for label, (x, y, colour, line) in series.items():
        alone = dict(ms=8, mec="k") if "-" not in line and ":" not in line else dict(ms=4)
        axis.plot(np.asarray(x), np.asarray(y), line, color=colour, label=label, **alone)
    _lines(axis, levels, marks, span)
    _finish(axis, legend, options)


def curves_with_errors(series, levels=None, axis=None, size=(6, 3.2), legend="best", **options) -> None:
    """Mean and standard deviation of {label: (x, values, colour)}, values (x, repeats)."""
    axis = _open(axis, size)
    for label, (x, values, colour) in series.items():
        values = np.asarray(values)
        axis.errorbar(
            x, values.mean(axis=1), values.std(axis=1, ddof=1), fmt="o-", capsize=3, color=colour, label=label
        )
    _lines(axis, levels, None, None)
    _finish(axis, legend, options)


def band(low, mean, high, formula, labels: Sequence[str], **options) -> None:
    """A band between `low` and `high`, a mean and a formula. Labels: of band, mean, formula."""
    axis = _open(None, (6, 2.8))
    axis.fill_between(range(len(mean)), low, high, color=DRAW, alpha=0.35, label=labels[0])
    axis.plot(mean, color=DRAW, label=labels[1])
    axis.plot(formula, "--", color=TEXT, label=labels[2])
    _finish(axis, "upper left", options)


def histograms(
    series, bins, marks=None, filled=True, density=False, axis=None, size=(6, 2.6), legend="best", **options
) -> None:
    """Histograms {label: (values, colour)} over common bins (a number, or edges): filled, or as outlines."""
    axis = _open(axis, size)
    if isinstance(bins, int):
        everything = np.concatenate([np.ravel(np.asarray(values)) for values, _ in series.values()])
        bins = np.linspace(everything.min(), everything.max(), bins)
    for k, (label, (values, colour)) in enumerate(series.items()):
        drawn = dict(histtype="stepfilled", alpha=0.75 if k else 1)
        if not filled:
            drawn = dict(histtype="step", lw=1.8, ls="--" if k else "-")
        axis.hist(np.asarray(values), np.asarray(bins), density=density, color=colour, label=label, **drawn)
    _lines(axis, None, marks, None)
    _finish(axis, legend, options)


def points(series, diagonal=False, axis=None, size=(5.6, 3.4), legend="best", **options) -> None:
    """Scatter plots {label: (x, y, colour, size of a point)}. `diagonal`: the line y = x, or its label."""
    axis = _open(axis, size)
    for label, (x, y, colour, ms) in series.items():
        edge = dict(mec="k", mew=0.5) if ms > 4 else {}
        x, y = np.ravel(np.asarray(x)), np.ravel(np.asarray(y))
        axis.plot(x, y, "o" if ms > 2 else ".", ms=ms, color=colour, label=label, rasterized=True, **edge)
    if diagonal:
        axis.axline(
            (0, 0), slope=1, color="k", lw=1, ls=":", label=diagonal if isinstance(diagonal, str) else None
        )
    _finish(axis, legend, options)


def bars(
    series, names, numbers=None, levels=None, axis=None, size=(5.6, 2.3), legend="best", **options
) -> None:
    """Groups of bars {label: (values, colour)}, a group for each name. `numbers`: a format, as "%.0f"."""
    axis = _open(axis, size)
    width = 0.8 / len(series)
    for k, (label, (values, colour)) in enumerate(series.items()):
        x = np.arange(len(values)) + (k - (len(series) - 1) / 2) * width
        drawn = axis.bar(x, np.asarray(values, dtype=float), width * 0.95, color=colour, label=label)
        if numbers:
            axis.bar_label(drawn, fmt=numbers, fontsize=8)
    if len(names):
        axis.set_xticks(range(len(names)), names)
    _lines(axis, levels, None, None)
    _finish(axis, legend, options)


def sizes(values: dict[str, float], colours: Sequence[str], **options) -> None:
    """Horizontal bars {name: value}, in the order given."""
    axis = _open(None, (6, 1.7))
    axis.barh(list(values), list(values.values()), color=colours)
    axis.invert_yaxis()
    axis.set(**options)


def parts(counts: dict[str, int], colours: Sequence[str], **options) -> None:
    """One bar, divided into parts {name: count}."""
    axis, left = _open(None, (6, 1.1)), 0
    for (name, count), colour in zip(counts.items(), colours):
        axis.barh(0, count, left=left, color=colour)
        axis.text(left + count / 2, 0, f"{name} {count}", ha="center", va="center", color="w")
        left += count
    axis.set(yticks=[], xlim=(0, left), **options)


# ---- draws of t_s


def draws_of_a_pair(draws, point, **options) -> None:
    """Scores of one pair on a line: of the drawn texts, of the best of them, and of the caption itself."""
    axis = _open(None, (8.4, 1.3))
    axis.plot(draws, np.zeros(len(draws)), "o", color=DRAW, alpha=0.7, label=f"{len(draws)} drawn texts")
    axis.plot(max(draws), 0, "^", ms=11, color=MATCH, mec="k", label="the best: the pair's score")
    axis.axvline(float(point), color=TEXT, label="the caption itself")
    axis.spines.left.set_visible(False)
    _finish(axis, "outside", dict(yticks=[], ylim=(-0.5, 0.5), **options))


def draws_of_captions(own, rival, **options) -> None:
    """Scores of captions with their own clip and with a rival. Each is a triple: all draws (M, captions), the
    best of them, and the caption itself (captions,)."""
    axis = _open(None, (7, 3))
    for (draws, best, point), colour, shift in ((own, MATCH, -0.12), (rival, OTHER, 0.12)):
        x = np.arange(len(best)) + shift
        axis.plot(np.broadcast_to(x, draws.shape), draws, ".", ms=4, color=colour, alpha=0.6)
        axis.plot(x, best, "^", ms=8, color=colour, mec="k")
        axis.plot(x, point, "_", ms=14, mew=2, color="k")
    for marker, label in ((".", "a draw"), ("^", f"the best of {len(own[0])}"), ("_", "$t$ itself")):
        axis.plot([], [], marker, color="w", ms=9, mec="k", mew=1.5, label=label)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), title="green: own clip\ngrey: best other clip")
    axis.set(xlabel="caption", ylabel="score", **options)


def ranking(scores, place: int, axis: Axes, title: str, **options) -> None:
    """Scores in falling order as bars, the one at `place` (from 0) in green."""
    scores, edges = np.asarray(scores), np.arange(len(scores) + 1) + 0.5
    axis.stairs(scores, edges, fill=True, color=OTHER)
    axis.bar(place + 1, scores[place], color=MATCH, width=1)
    axis.set_title(title, fontsize=9)
    axis.set(**options)


def radii_of_channels(W, own, other) -> None:
    """W (frames, channels) as a heat map, and R of two pairs in every channel, sorted by the first."""
    above, below = panels(2, 1, (7.4, 3.6), height_ratios=(1, 1.5))
    W, order = np.asarray(W), np.argsort(np.asarray(own))
    limit = float(np.abs(W).max())
    plt.colorbar(heat(above, W, aspect="auto", cmap="PuOr", vmin=-limit, vmax=limit), ax=above)
    above.set(ylabel="frame", title="$W$: the weight of each frame's similarity in a channel's $\\log R$")
    below.plot(np.asarray(other)[order], ".", ms=3, color=OTHER, label="with the other clip")
    below.plot(np.asarray(own)[order], color=MATCH, label="with its own clip")
    _finish(below, "best", dict(xlabel="channels, sorted by the radius with its own clip", ylabel="$R$"))
