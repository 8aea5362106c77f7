"""One look for all notebooks. A colour means the same everywhere; the set is Okabe and Ito's, which colour-blind readers tell apart, and
whose greys differ in print."""

import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler

TEXT, DRAW, MATCH, OTHER = "#0072b2", "#e69f00", "#009e73", "#8c8c8c"  # t; t_s; the matching clip, and what is right; other clips
SUPPORT = "#d55e00"  # t_sup, and what is wrong or slow
SKY, PINK, BLACK = "#56b4e9", "#cc79a7", "#1a1a1a"
HEAT = "cividis"  # of heat maps

plt.rcParams.update(
    {
        "figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 9.5, "axes.titlesize": 10, "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": cycler(color=[TEXT, DRAW, MATCH, PINK, SUPPORT, SKY]),
        "lines.linewidth": 1.8, "legend.frameon": False, "legend.fontsize": 8.5, "image.cmap": HEAT,
    }
)  # fmt: skip


def plane(axis, title: str = "") -> None:
    """Two channels of the joint space, with the same unit on both axes."""
    axis.axhline(0, color="0.9", lw=1, zorder=0)
    axis.axvline(0, color="0.9", lw=1, zorder=0)
    axis.set(aspect="equal", xlabel="first channel", ylabel="second channel", title=title)


def arrows(axis, points, colour: str, label: str) -> None:
    """Vectors (n, 2) from the origin."""
    for k, (x, y) in enumerate(np.asarray(points)):
        axis.annotate("", (x, y), (0, 0), arrowprops=dict(arrowstyle="-|>", color=colour, lw=1.8, shrinkA=0, shrinkB=0))
        axis.plot(x, y, ".", color=colour, label=label if k == 0 else None)


def strip(axis, pictures, title: str = "") -> None:
    """The frames of a clip side by side: frame k is centred at x = k, so that bars of another axis can stand below it."""
    wide = np.concatenate([np.pad(picture, ((0, 0), (2, 2), (0, 0)), constant_values=255) for picture in pictures], axis=1)
    axis.imshow(wide, extent=(-0.5, len(pictures) - 0.5, 0, 1), aspect="auto")
    axis.set(xlim=(-0.5, len(pictures) - 0.5), title=title)
    axis.axis("off")


def thumbnail(axis, pictures, frame: str | None = None) -> None:
    """One picture for a clip: its 2nd, 6th and 11th part, with a coloured frame where one is named."""
    axis.imshow(np.concatenate([pictures[k * len(pictures) // 12] for k in (1, 5, 10)], axis=1))
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=frame is not None, color=frame, linewidth=4)


def heat(axis, matrix, rows=None, columns=None, numbers: str | None = None, **options):
    """A heat map with names on its axes and, with a format such as ".2f", its numbers."""
    matrix = np.asarray(matrix)
    image = axis.imshow(matrix, aspect=options.pop("aspect", "equal"), **options)
    for ticks, names in ((axis.set_xticks, columns), (axis.set_yticks, rows)):
        ticks(range(len(names)) if names is not None else [], names if names is not None else [])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for (y, x), value in np.ndenumerate(matrix) if numbers else ():
        dark = image.norm(value) < 0.5
        axis.text(x, y, format(value, numbers), ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return image


def key_figure(figure, name: str) -> None:
    """Keeps a figure as NAME.png in the folder that TMASS_FIGURES names (`make figures`: assets); else does nothing."""
    if folder := os.environ.get("TMASS_FIGURES"):
        figure.savefig(Path(folder) / f"{name}.png", dpi=120, bbox_inches="tight", metadata={"Software": None})
