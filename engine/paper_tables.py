"""The experiments of reproduce.py: tables whose rows are training flags and a way to score ("Experiments").

To add one, add a Table to TABLES; `python reproduce.py --table NAME` then trains and scores its rows.
"""

import itertools
from dataclasses import dataclass

from engine.analysis import PAIRS
from engine.config import RECIPES
from model import RADII

MEAN = {"method": "clip"}
XPOOL = {"method": "xpool"}
PAPER = {"method": "tmass", "recipe": "paper"}
BEST = {"method": "tmass", "recipe": "best"}
LAYER = {"method": "tmass", "radius": "none", "radius_lr": RECIPES["best"]["radius_lr"]}  # of a control

# On the built-in clips psi and R train alone, on fixed features. Rate and dropout: the best of the table
# "search" in the mean over X-Pool and both recipes, on validation.
HEADS = dict(freeze="clip", batch=32, epochs=3, clip_lr=3e-4, head_lr=5e-4, dropout=0.0)

# Ways to score a trained model, as flags of evaluate.py. Without a mass, t itself is scored in all of them.
SCORES: dict[str, dict] = {
    **{f"M={M}": dict(M=M) for M in (0, 1, 5, 10, 20, 30, 50)},
    "mc": dict(score="mc"), "mc, M=1": dict(score="mc", M=1),
    "delta": dict(score="delta"), "delta, M=1": dict(score="delta", M=1),
    "first": dict(captions="first"), "first, delta": dict(captions="first", score="delta"),
    "first, M=0": dict(captions="first", M=0), "LEAKS": dict(captions="first", protocol="released"),
    "first, one draw": dict(captions="first", M=1, noise="independent"),
}  # fmt: skip


QUERIES = "queries, "  # before a key of SCORES: the same, with numbers of each query (engine/analysis.py)


@dataclass(frozen=True)
class Row:
    """A row of a table: the flags of train.py it is trained with, and how it is scored (a key of SCORES)."""

    name: str
    flags: dict
    score: str = "M=20"
    baseline: str | None = None  # the row it is compared with; default: the first of the table
    x: float | int | None = None  # its place on the axis of the figure


RANKS = tuple(f"{way} {metric}" for way in ("t2v", "v2t") for metric in ("R@1", "R@5", "R@10", "MdR", "MnR"))
START, END = "\\|R eps\\| / \\|t\\| at the start", "at the end"  # of training
RELEVANCE = ("t2v fits@1", "t2v R-Precision", "t2v mAP@R")  # shown where it is known what is relevant
DIGITS = {**dict.fromkeys(PAIRS, 3), **dict.fromkeys((START, END), 2)}  # decimals in a table; others: one
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
    queries: bool = False  # numbers of each query are kept too
    scenes: bool = False  # the rows are also scored on clips of other numbers of scenes
    choice: bool = False  # settings to choose from: always scored on validation, whatever --split says

    def key(self, row: Row) -> str:
        """The name of a row's results: its key of SCORES, or QUERIES and it."""
        return QUERIES + row.score if self.queries else row.score


TUNED = {"freeze": "vision", "epochs": 2, "clip_lr": 1e-4}  # phi_t learns too
MAIN = (
    Row("X-Pool", XPOOL), Row("T-MASS, paper", PAPER), Row("best recipe", BEST),
    Row("best recipe, delta form", BEST, "delta"),
)  # fmt: skip

RATES, DROPOUTS = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), (0.0, 0.1, 0.3, 0.5)


def settings(name: str, flags: dict, rates=RATES, dropouts=DROPOUTS) -> tuple[Row, ...]:
    """A row for each rate of psi and each dropout."""
    rows = []
    for rate, dropout in itertools.product(rates, dropouts):
        own = dict(head_lr=rate, dropout=dropout)
        rows.append(Row(f"{name}, rate {rate:g}, dropout {dropout:g}", {**flags, **own}))
    return tuple(rows)


# Masses that were tried: (name, flags)
MASSES = (
    ("paper", PAPER), ("paper, initial R = 0.4", {**PAPER, "initial_radius": 0.4}),
    ("paper, R in units of t, 0.3", {**PAPER, "radius": "relative", "initial_radius": 0.3}),
    ("paper, bounded R, 0.3", {**PAPER, "radius": "bounded", "initial_radius": 0.3}),
    ("paper, inclusion of captions", {**PAPER, "inclusion": 1.0}),
    ("paper, R in units of t, 0.3, inclusion of captions",
     {**PAPER, "radius": "relative", "initial_radius": 0.3, "inclusion": 1.0}),
    ("best recipe", BEST), ("best recipe, trained by draws", {**BEST, "pairs": "draws"}),
    ("best recipe, trained by soft draws", {**BEST, "pairs": "soft"}),
    ("best recipe, bounded R, 0.3", {**BEST, "radius": "bounded", "initial_radius": 0.3}),
    ("best recipe, bounded R, 0.3, trained by draws",
     {**BEST, "radius": "bounded", "initial_radius": 0.3, "pairs": "draws"}),
    ("best recipe, inclusion of captions", {**BEST, "inclusion": 0.1}),
)  # fmt: skip

FORMS = {"fixed": "exp(mean S)", "scalar": "exp(theta mean S)", "linear": "exp(S W + b)"}  # b: the release's

TABLES: dict[str, Table] = {
    "recipes": Table("X-Pool, the paper's recipe, the best recipe", (
        Row("X-Pool", XPOOL), Row("T-MASS, paper", PAPER),
        Row("T-MASS, paper, t alone", PAPER, "M=0"), Row("T-MASS, best recipe, delta form", BEST, "delta"),
        Row("T-MASS, best recipe, 20 draws", BEST), Row("T-MASS, best recipe, t alone", BEST, "M=0"),
    ), leaks=True, note="The released protocol needs one caption a clip, and pools each video by its own."),
    "search": Table("settings of X-Pool and of both recipes, to choose from", (
        *settings("X-Pool", XPOOL),
        *settings("T-MASS, paper", PAPER, RATES[:4], DROPOUTS[:3]),
        *settings("T-MASS, best recipe", BEST, RATES[:4], DROPOUTS[:3]),
        *(Row(f"{name}, 6 epochs", {**flags, "epochs": 6})
          for name, flags in (("X-Pool", XPOOL), ("T-MASS, paper", PAPER), ("T-MASS, best recipe", BEST))),
    ), choice=True, columns=("t2v R@1", "t2v R@5", "t2v R@10", "v2t R@1"), compared=(),
       note="On validation, by 20 draws. Rate: of psi, and of the paper's R. 3 epochs, if not said."),
    "masses": Table("masses that were tried", (
        Row("X-Pool", XPOOL),
        *(Row(f"{name}{also}", flags, key)
          for name, flags in MASSES for also, key in (("", "M=20"), (", t alone", "M=0"))),
        Row("masses on both sides", {**LAYER, "fusion": "two-masses"}),
    ), choice=True, columns=("t2v R@1", "t2v R@5", "t2v R@10", "v2t R@1"), compared=("t2v R@1",),
       note="On validation, by 20 draws or by t alone. Forms: engine/masses.py."),
    "chosen-mass": Table("the mass of the table masses that did best on validation", (
        Row("X-Pool", XPOOL), Row("best recipe", BEST),
        Row("best recipe, inclusion of captions", {**BEST, "inclusion": 0.1}),
        Row("best recipe, inclusion of captions, t alone", {**BEST, "inclusion": 0.1}, "M=0"),
    ), note="Chosen by R@1 with 20 draws; the table masses has two seeds."),
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
        Row("X-Pool", XPOOL), Row("best recipe", BEST, "delta"),
        Row("R = exp(S W + b), its rate 1e-2", {**BEST, "radius": "linear", "radius_lr": 1e-2}, "delta"),
        Row("without L_ce", {**BEST, "ce": 0.0}, "delta"),
        Row("M = 1: no choice among draws", {**BEST, "M": 1}, "delta, M=1"),
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
        Row("best recipe, M = 1: mean of a draw", {**BEST, "M": 1}, "mc, M=1"),
        Row("best recipe, 20 draws", BEST), Row("best recipe, expected best of 20", BEST, "mc"),
        Row("best recipe, by the delta form", BEST, "delta"), Row("best recipe, t alone", BEST, "M=0"),
        Row("T-MASS, paper", PAPER), Row("T-MASS, paper, t alone", PAPER, "M=0"),
    ), note="A control (engine/controls.py) trains the layer by L_ce of its own score, at the rate of R. "
            "Video moved is X-Pool with as many parameters as the best recipe."),
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
        Row("T-MASS, best recipe: t_s, delta form", BEST, "first, delta"),
    ), columns=(*PAIRS, "t2v R@1"), compared=(PAIRS[0], PAIRS[2]),
       note="One caption a clip. Irrelevant: a text and each video except its own, pooled by that text. Loss "
            "of a relevant pair: its term of L_ce in a batch of test pairs, - log softmax at the run's "
            "temperature, mean of both directions. One draw: each pair has its own."),
    "curves": Table("training curves", (
        Row("X-Pool", XPOOL), Row("T-MASS, paper", PAPER), Row("T-MASS, best recipe", BEST, "delta"),
    ), columns=("t2v R@1", "v2t R@1"),
       note="Loss: L_ce of X-Pool, L_s of T-MASS. Recall by step is on validation, the table on test."),
    "complexity": Table("recall by the complexity of the clip", MAIN, queries=True, scenes=True, columns=(
        "t2v R@1", "t2v R@10", "v2t R@1", "v2t R@10",
    ), note="Thirds of the test clips by the dispersion of their frames, 1 - |mean_i f_i / |f_i||; and 800 "
            "more clips of one to five scenes (data set shapes-scenes), where all rows were trained on three "
            "scenes. A query of t2v belongs to the group of its caption's clip. Captions of one-scene clips "
            "tell of one scene only, so many clips fit them. A gain is the difference to "
            "X-Pool, with its 95 % interval over seeds (over seeds and clips)."),
    "uncertainty": Table("what R means: uncertainty of a query against R@1", MAIN,
        queries=True, columns=("t2v R@1",), compared=("t2v R@1",),
        note="Uncertainties of a caption, at its first answer: the noise |R eps|, alone and relative to |t|; "
             "the spread of the answer's score over 200 draws; the entropy of the softmax of all scores at "
             "the run's temperature. Baselines: minus the cosine of the first answer, minus its lead over "
             "the second. S, R^2: of ten levels of uncertainty against R@1; -S R^2 is 1 at best. Rejection: "
             "R@1 of the captions that are left without the most uncertain 0, 5 ... 95 %, and its mean. "
             "Fitting clips: how many clips fit the caption; an unspecific caption fits many."),
    "relevance": Table("known relevance: every clip that fits a caption counts", (
        Row("X-Pool", XPOOL), Row("mean pooling", MEAN),
        *(row for row in MAIN[1:]),
        Row("video moved", {**LAYER, "fusion": "video-moved"}),
        Row("text moved", {**LAYER, "fusion": "text-moved"}),
        Row("number added", {**LAYER, "fusion": "number"}),
    ), queries=True, columns=("t2v R@1",), compared=("t2v R@1", *RELEVANCE),
       note="The rows of recipes and controls, by what is relevant and not by a caption's own clip alone."),
    "fine-tuning": Table("the text encoder learns, too", tuple(
        Row(row.name, {**row.flags, **TUNED}, row.score)
        for row in (*MAIN, Row("best recipe, M = 1: mean of a draw", {**BEST, "M": 1}, "mc, M=1"))
    ), note="--freeze vision: phi_t, psi and R learn on fixed features of the frames, with equal epochs and "
            "rates, which are meant for the built-in clips."),
    "radius-scale": Table("how large the noise is next to the text, the paper's recipe", tuple(
        Row(f"{name}, initial R = {r:g}", {**PAPER, "initial_radius": r}, key,
            baseline=f"t alone, initial R = {r:g}", x=r)
        for name, key in (("20 draws", "M=20"), ("t alone", "M=0")) for r in (0.05, 0.15, 0.4, 1.0, 2.0, 5.0)
    ), axis="initial R", queries=True, columns=(START, END, "t2v R@1", "t2v R@10", "t2v MnR", "v2t R@1"),
       note="The ratio |R eps| / |t| is that of the test captions and their own clips, before and after "
            "training with the paper's rates. The baseline is the same run, scored by t alone."),
}  # fmt: skip
