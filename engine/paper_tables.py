"""The experiments of reproduce.py: tables whose rows are training flags and a way to score ("Experiments").

To add one, add a Table to TABLES; `python reproduce.py --table NAME` then trains and scores its rows.
"""

from dataclasses import dataclass

from engine.config import RECIPES
from model import RADII

MEAN = {"method": "clip"}
XPOOL = {"method": "xpool"}
PAPER = {"method": "tmass", "recipe": "paper"}
BEST = {"method": "tmass", "recipe": "best"}
LAYER = {"method": "tmass", "radius": "none", "radius_lr": RECIPES["best"]["radius_lr"]}  # of a control

# Ways to score a trained model, as flags of evaluate.py. Without a mass, t itself is scored in all of them.
SCORES: dict[str, dict] = {
    **{f"M={M}": dict(M=M) for M in (0, 1, 5, 10, 20, 30, 50)},
    "expected": dict(score="expected"), "expected, M=1": dict(score="expected", M=1),
    "first": dict(captions="first"), "first, expected": dict(captions="first", score="expected"),
    "first, M=0": dict(captions="first", M=0), "LEAKS": dict(captions="first", protocol="released"),
    "first, one draw": dict(captions="first", M=1, noise="independent"),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of a table: the flags of train.py it is trained with, and how it is scored (a key of SCORES)."""

    name: str
    flags: dict
    score: str = "M=20"
    baseline: str | None = None  # the row it is compared with; default: the first of the table
    x: float | int | None = None  # its place on the axis of the figure


RANKS = tuple(f"{way} {metric}" for way in ("t2v", "v2t") for metric in ("R@1", "R@5", "R@10", "MdR", "MnR"))
RELEVANCE = ("t2v fits@1", "t2v R-Precision", "t2v mAP@R")  # shown where it is known what is relevant
PAIRS = ("cosine of irrelevant pairs", "cosine of relevant pairs", "loss of relevant pairs")
DIGITS = dict.fromkeys(PAIRS, 3)  # decimals of a number in a table; others have one
HONEST, LEAKS = "one caption a clip: t2v R@1", "one caption a clip, released protocol, LEAKS: t2v R@1"


@dataclass(frozen=True)
class Table:
    """An experiment: its rows (the first is the baseline), and which numbers of them are shown."""

    title: str
    rows: tuple[Row, ...]
    axis: str | None = None  # what the x axis of the figure shows; without: rows one above the other
    leaks: bool = False  # two more columns: one caption a clip, without the leak and by the released protocol
    columns: tuple[str, ...] = RANKS
    compared: tuple[str, ...] = ("t2v R@1", "v2t R@1")
    note: str = ""  # how the experiment of the paper is read


FORMS = {"fixed": "exp(mean S)", "scalar": "exp(theta mean S)", "linear": "exp(S W + b)"}  # b: the release's

TABLES: dict[str, Table] = {
    "recipes": Table("X-Pool, the paper's recipe, the best recipe", (
        Row("X-Pool", XPOOL), Row("T-MASS, paper", PAPER),
        Row("T-MASS, paper, expected best", PAPER, "expected"), Row("T-MASS, best recipe", BEST, "expected"),
        Row("T-MASS, best recipe, 20 draws", BEST), Row("T-MASS, best recipe, t alone", BEST, "M=0"),
    ), leaks=True, note="The released protocol needs one caption a clip, and pools each video by its own."),
    "methods": Table("mean pooling, X-Pool and T-MASS, text-to-video and video-to-text", (
        Row("X-Pool", XPOOL), Row("mean pooling", MEAN), Row("T-MASS, paper", PAPER),
    ), note="Mean pooling has X-Pool's flags; with --freeze clip it is the pretrained CLIP, unchanged."),
    "radius": Table("forms of the radius", (
        Row("X-Pool", XPOOL),
        *(Row(f"R = {FORMS[kind]}", {**PAPER, "radius": kind}) for kind in RADII if kind in FORMS),
    )),
    "ablation": Table("text, stochastic text and losses", (
        Row("t, L_ce", XPOOL), Row("t_s, L_ce + L_s", {**PAPER, "alpha": 0.0, "ce": 1.0}),
        Row("t_s, L_s", {**PAPER, "alpha": 0.0}), Row("t_s, L_s + alpha L_sup", PAPER),
    ), note="t alone is X-Pool."),
    "parts": Table("parts of the best recipe", (
        Row("X-Pool", XPOOL), Row("best recipe", BEST, "expected"),
        Row("R = exp(S W + b), its rate 1e-2", {**BEST, "radius": "linear", "radius_lr": 1e-2}, "expected"),
        Row("without L_ce", {**BEST, "ce": 0.0}, "expected"),
        Row("M = 1: no choice among draws", {**BEST, "M": 1}, "expected, M=1"),
        Row("its R, with the paper's training", {**PAPER, "radius": "joint"}),
    ), note="The best recipe with one part left out or changed. The last row has the paper's losses, rates "
            "and 20 draws. With M = 1 the score is the mean over the mass: no draw is chosen. Checkpoints "
            "are chosen by drawn scores in every row."),
    "controls": Table("the layer of the best recipe's R, used without a mass", (
        Row("X-Pool", XPOOL), Row("video moved", {**LAYER, "fusion": "video-moved"}),
        Row("text moved", {**LAYER, "fusion": "text-moved"}),
        Row("number added", {**LAYER, "fusion": "number"}),
        Row("number of the text alone", {**LAYER, "fusion": "text-number"}),
        Row("dispersion of the frames", {**LAYER, "fusion": "dispersion"}),
        Row("best recipe without L_ce", {**BEST, "ce": 0.0}, "expected"),
        Row("best recipe without L_ce, M = 1", {**BEST, "ce": 0.0, "M": 1}, "expected, M=1"),
        Row("best recipe", BEST, "expected"), Row("T-MASS, paper", PAPER),
    ), note="A control (engine/controls.py) trains the layer by L_ce of its own score, at the rate of R. "
            "Video moved is X-Pool with as many parameters. The best recipe without L_ce has one loss, too."),
    "M": Table("texts drawn for each pair at test time, the paper's recipe", tuple(
        Row(f"M = {M}", PAPER, f"M={M}", x=M) for M in (0, 1, 5, 10, 20, 30, 50)
    ), axis="M", note="One training a seed; M = 0 scores t itself."),
    "alpha": Table("weight of the support-text loss", tuple(
        Row(f"alpha = {a:g}", {**PAPER, "alpha": a}, x=a) for a in (0.0, 0.4, 0.8, 1.2, 1.6, 2.0)
    ), axis="alpha"),
    "frames": Table("frames a clip", tuple(
        Row(f"{name}, T' = {n}", {**flags, "num_frames": n}, baseline=f"X-Pool, T' = {n}", x=n)
        for name, flags in (("X-Pool", XPOOL), ("T-MASS", PAPER)) for n in (4, 8, 12)
    ), axis="T'", note="In training and test. The baseline is X-Pool with as many frames."),
    "analysis": Table("irrelevant and relevant pairs (the paper's further analysis)", (
        Row("T-MASS, paper: t", PAPER, "first, M=0"),
        Row("T-MASS, paper: t_s, one draw", PAPER, "first, one draw"),
        Row("T-MASS, paper: t_s, best of 20", PAPER, "first"), Row("X-Pool: t", XPOOL, "first"),
        Row("T-MASS, best recipe: t_s, expected best", BEST, "first, expected"),
    ), columns=(*PAIRS, "t2v R@1"), compared=(PAIRS[0], PAIRS[2]),
       note="One caption a clip. Irrelevant: a text and each video except its own, pooled by that text. Loss "
            "of a relevant pair: its term of L_ce in a batch of test pairs, - log softmax at the run's "
            "temperature, mean of both directions. One draw: each pair has its own."),
    "curves": Table("training curves", (
        Row("X-Pool", XPOOL), Row("T-MASS, paper", PAPER), Row("T-MASS, best recipe", BEST, "expected"),
    ), columns=("t2v R@1", "v2t R@1"),
       note="Loss: L_ce of X-Pool, L_s of T-MASS. Recall by step is on validation, the table on test."),
}  # fmt: skip
