"""Every experiment of the paper as a table or figure, in one command, at the scale of the given data set ("Experiments").

    python reproduce.py                                     # all of them on the built-in clips: psi and R train on fixed features
    python reproduce.py --table recipes alpha --seeds 10
    python reproduce.py --dataset msrvtt --arch ViT-B/32

A cell is one training run (train.train: a row's flags and a seed) in a folder of its own; its checkpoint is chosen on validation, and scored in
as many ways as the tables ask for (evaluate.py), each once. What is finished is not done again, and a run that was stopped goes on: the same
command continues, with more tables or seeds too. Started several times at once (a process a GPU or core), each takes cells that no other has.
Differences to a row's baseline are paired: each seed's own, their mean, and Student's 95 % interval of it.
"""

import contextlib
import fcntl
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

import data
import train
from data import DataError
from evaluate import EvaluationConfig, Features, Opened, choose_device, open_run, retrieval_metrics, score_all
from model import ModelError, load_file, save_checkpoint
from train import RECIPES, Config, plain, preset, read_log

# ------------------------------------------------------------------------------------------------------ the experiments, as rows of flags

MEAN = {"method": "clip"}
XPOOL = {"method": "xpool"}
PAPER = {"method": "tmass", "recipe": "paper"}
BEST = {"method": "tmass", "recipe": "best"}

# Ways to score a trained model: flags of evaluate.py. A model without a mass scores t itself in all of them.
SCORES: dict[str, dict] = {
    **{f"M={M}": dict(M=M) for M in (0, 1, 5, 10, 20, 30, 50)},
    "expected": dict(score="expected"),
    "expected, M=1": dict(score="expected", M=1),
    "first": dict(captions="first"),
    "first, expected": dict(captions="first", score="expected"),
    "first, M=0": dict(captions="first", M=0),
    "first, one draw": dict(captions="first", M=1, noise="independent"),
    "LEAKS": dict(captions="first", protocol="released"),
}


@dataclass(frozen=True)
class Row:
    """A line of a table: the flags of train.py it trains with, and how it is scored (a key of SCORES)."""

    name: str
    flags: dict
    score: str = "M=20"
    baseline: str | None = None  # the row that it is compared with; default: the table's first
    x: float | None = None  # its place in the figure


RANKS = tuple(f"{direction} {metric}" for direction in ("t2v", "v2t") for metric in ("R@1", "R@5", "R@10", "MdR", "MnR"))
PAIRS = ("cosine of irrelevant pairs", "cosine of relevant pairs", "loss of relevant pairs")
HONEST, LEAKS = "one caption a clip: t2v R@1", "one caption a clip, released protocol, LEAKS: t2v R@1"


@dataclass(frozen=True)
class Table:
    """An experiment: its rows, of which the first is the baseline; `axis` names what is drawn from left to right in its figure, if it has one."""

    title: str
    rows: tuple[Row, ...]
    axis: str | None = None
    leaks: bool = False  # two more columns: one caption a clip, honest and by the released protocol
    columns: tuple[str, ...] = RANKS
    compared: tuple[str, ...] = ("t2v R@1", "v2t R@1")
    note: str = ""  # how the paper is read


TABLES: dict[str, Table] = {
    "recipes": Table("X-Pool, the paper's recipe, the best recipe", (
        Row("X-Pool", XPOOL), Row("T-MASS, paper", PAPER), Row("T-MASS, paper, expected best", PAPER, "expected"),
        Row("T-MASS, best recipe", BEST, "expected"), Row("T-MASS, best recipe, 20 draws", BEST), Row("T-MASS, best recipe, t alone", BEST, "M=0"),
    ), leaks=True, note="The released protocol needs one caption a clip, and pools each video by its own."),
    "methods": Table("mean pooling, X-Pool and T-MASS, text-to-video and video-to-text", (
        Row("X-Pool", XPOOL), Row("mean pooling", MEAN), Row("T-MASS, paper", PAPER),
    ), note="Mean pooling trains with X-Pool's flags; with --freeze clip it has nothing to learn, and is the pretrained CLIP."),
    "radius": Table("forms of the radius", (
        Row("X-Pool", XPOOL), *(Row(f"R = {form}", {**PAPER, "radius": kind}) for kind, form in
                                (("fixed", "exp(mean S)"), ("scalar", "exp(theta mean S)"), ("linear", "exp(S W + b)"))),
    )),
    "ablation": Table("text, stochastic text and losses", (
        Row("t, L_ce", XPOOL), Row("t_s, L_ce + L_s", {**PAPER, "alpha": 0.0, "ce": 1.0}), Row("t_s, L_s", {**PAPER, "alpha": 0.0}),
        Row("t_s, L_s + alpha L_sup", PAPER),
    ), note="t alone is X-Pool."),
    "parts": Table("what the best recipe is made of", (
        Row("X-Pool", XPOOL), Row("best recipe", BEST, "expected"),
        Row("R = exp(S W + b), its rate 1e-2", {**BEST, "radius": "linear", "radius_lr": 1e-2}, "expected"),
        Row("without L_ce", {**BEST, "ce": 0.0}, "expected"), Row("M = 1: no choice among draws", {**BEST, "M": 1}, "expected, M=1"),
        Row("its R, with the paper's training", {**PAPER, "radius": "joint"}),
    ), note="The best recipe with a part left out or changed; the last row has the paper's losses, rates and 20 draws. With M = 1 the score is the "
            "mean over the mass: no draw is chosen from. Checkpoints are chosen by drawn scores, as always."),
    "M": Table("texts drawn for each pair at test time, the paper's recipe", tuple(
        Row(f"M = {M}", PAPER, f"M={M}", x=M) for M in (0, 1, 5, 10, 20, 30, 50)), axis="M", note="One training a seed; M = 0 scores t itself."),
    "alpha": Table("weight of the support-text loss", tuple(
        Row(f"alpha = {alpha:g}", {**PAPER, "alpha": alpha}, x=alpha) for alpha in (0.0, 0.4, 0.8, 1.2, 1.6, 2.0)), axis="alpha"),
    "frames": Table("frames a clip", tuple(
        Row(f"{name}, T' = {frames}", {**flags, "num_frames": frames}, baseline=f"X-Pool, T' = {frames}", x=frames)
        for name, flags in (("X-Pool", XPOOL), ("T-MASS", PAPER)) for frames in (4, 8, 12)), axis="T'",
        note="In training and test; the baseline is X-Pool with as many frames."),
    "analysis": Table("irrelevant and relevant pairs (the paper's further analysis)", (
        Row("T-MASS, paper: t", PAPER, "first, M=0"), Row("T-MASS, paper: t_s, one draw", PAPER, "first, one draw"),
        Row("T-MASS, paper: t_s, best of 20", PAPER, "first"), Row("X-Pool: t", XPOOL, "first"),
        Row("T-MASS, best recipe: t_s, expected best", BEST, "first, expected"),
    ), columns=(*PAIRS, "t2v R@1"), compared=(PAIRS[0], PAIRS[2]),
        note="One caption a clip. Irrelevant: a text and each video but its own, pooled by that text. Loss of a relevant pair: its term of L_ce in "
             "a batch of test pairs, - log softmax at the run's temperature, mean of both directions. One draw: each pair has its own."),
    "curves": Table("training curves", (Row("X-Pool", XPOOL), Row("T-MASS, paper", PAPER), Row("T-MASS, best recipe", BEST, "expected")),
                    columns=("t2v R@1", "v2t R@1"), note="Loss: L_ce of X-Pool, L_s of T-MASS. Recall by step on validation; the table: test."),
}  # fmt: skip

Name = Literal["recipes", "methods", "radius", "ablation", "parts", "M", "alpha", "frames", "analysis", "curves"]


@dataclass(frozen=True)
class ReproduceConfig:
    """Which experiments, on what, and how often."""

    table: tuple[Name, ...] = get_args(Name)
    """which tables; default: all of them"""
    seeds: int = 5
    """runs of each row; 2 at least, for an interval"""
    dataset: str = "shapes"
    """as of train.py"""
    arch: str | None = None
    """tiny, ViT-B/32, ViT-B/16 or a file; default: the data set's preset"""
    weights: Path | None = None
    annotations: Path | None = None
    videos: Path | None = None
    data: Path = Path("data")
    freeze: Literal["none", "vision", "clip"] | None = None
    """default: clip for the built-in clips (psi, R and the temperature train on fixed features), else the preset's"""
    split: Literal["test", "val"] = "test"
    """choices belong to val, the test split to the end"""
    epochs: int | None = None
    batch: int | None = None
    max_steps: int | None = None
    out: Path = Path("runs/reproduce")
    """cells, tables and figures, in a folder for each data set and arch"""
    device: str = "auto"
    workers: int | None = None
    allow_missing: bool = False
    """as of evaluate.py"""


# psi and R alone, on fixed features of the built-in clips: rates tuned for X-Pool on validation (RESULTS.md), and the same for every row.
HEADS = dict(freeze="clip", batch=32, epochs=6, clip_lr=3e-4, head_lr=5e-4)


def cell_config(config: ReproduceConfig, flags: dict, seed: int) -> Config:
    """The run of a row and a seed: the data set's preset, what this command says for all rows, the recipe, then the row's flags."""
    recipe = flags.get("recipe", "paper")
    base = replace(preset(config.dataset, "xpool"), method=flags["method"], recipe=recipe)  # mean pooling trains as the others do
    if config.dataset == "shapes" and config.freeze in (None, "clip"):
        base = replace(base, **HEADS)
    names = ("arch", "weights", "freeze", "epochs", "batch", "max_steps", "workers")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    base = replace(base, **(RECIPES[recipe] if flags["method"] == "tmass" else {}), **given)
    base = replace(base, annotations=config.annotations, videos=config.videos, data=config.data, device=config.device, M=20)
    return replace(base, augment=base.augment and base.freeze == "none", **flags, seed=seed, out=cell_folder(config, flags, seed), resume=True)


def root(config: ReproduceConfig) -> Path:
    """Where the cells and tables of a data set and arch lie."""
    arch = config.arch or preset(config.dataset, "xpool").arch
    return config.out / f"{config.dataset}-{Path(arch).stem if Path(arch).is_file() else arch}".replace("/", "").lower()


def cell_folder(config: ReproduceConfig, flags: dict, seed: int) -> Path:
    """A cell's folder, named by its flags but for those at their defaults: rows of several tables that train alike share it."""
    default = vars(Config()) if flags.get("recipe", "paper") == "paper" else {}  # another recipe has defaults of its own
    named = [f"{name}={value}" for name, value in flags.items() if name != "method" and default.get(name) != value]
    extra = [*named, *([f"freeze={config.freeze}"] if config.freeze else [])]
    return root(config) / "-".join([flags["method"], *extra]) / f"seed{seed}"


# -------------------------------------------------------------------------------------------------------------------- running the cells


@dataclass
class Jobs:
    """The cells that the tables need, each with the ways to score it; `failed`: a sentence for each cell that could not be had."""

    config: ReproduceConfig
    tables: dict[str, Table]
    cells: dict[Path, Config] = field(default_factory=dict)
    scores: dict[Path, set[str]] = field(default_factory=dict)
    failed: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self):
        for seed in range(self.config.seeds):  # seed by seed, so that rows can be compared early
            for table in self.tables.values():
                for row in table.rows:
                    cell = cell_config(self.config, row.flags, seed)
                    self.cells[cell.out] = cell
                    self.scores.setdefault(cell.out, set()).update({row.score, *((_first(row.score), "LEAKS") if table.leaks else ())})

    def missing(self, cell: Path) -> list[str]:
        """The ways to score a cell that have no result yet, in a fixed order."""
        return sorted(key for key in self.scores[cell] if not score_file(cell, self.config.split, key).exists())

    def run(self) -> None:
        """Does what is missing, cell by cell. One that fails is named in one sentence, and the others go on."""
        todo = []
        for cell in self.cells:
            if not (cell / "seconds.json").exists() or self.missing(cell):
                todo.append(cell)
            elif sentence := stale(self.cells[cell]):
                self.failed[cell] = sentence
        print(f"{len(self.cells)} cells, {len(self.cells) - len(todo)} of them finished, in {root(self.config)}", flush=True)
        with tqdm(total=len(todo), desc="cells", unit=" cells", smoothing=0, mininterval=0) as bar:
            for wait in (False, True):  # cells that another process is at come last
                taken = []
                for cell in todo:
                    with claim(cell, wait) as mine:
                        if not mine:
                            taken.append(cell)
                            continue
                        bar.set_postfix_str(str(cell.relative_to(root(self.config))))
                        if sentence := self.attempt(cell):
                            self.failed[cell] = sentence
                            bar.write(f"failed: {cell}: {sentence}", file=sys.stderr)
                    bar.update()
                todo = taken

    def attempt(self, cell: Path) -> str:
        """Does what is missing of a cell; what training prints goes to its log.txt. Returns "", or why it could not be had."""
        with (cell / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                self.train_and_score(cell)
            except Exception as error:  # bad data, out of memory, a bug: the other cells go on
                known = isinstance(error, DataError | ModelError)
                return str(error) if known else f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        return ""

    def train_and_score(self, cell: Path) -> None:
        """A cell by itself: its numbers follow from its config alone. Raises what train.train and evaluate.py raise."""
        config, started = self.cells[cell], time.time()
        if not (cell / "seconds.json").exists():
            if config.method == config.freeze == "clip":  # mean pooling of fixed features: nothing to learn
                save_checkpoint(cell / "best.pt", train.build(config), config=plain(config))
            else:
                train.train(config)
            _write(cell / "seconds.json", round(max(time.time() - started, training_seconds(cell)), 1))
        if sentence := stale(config):
            raise ModelError(sentence)
        keys, started = self.missing(cell), time.time()
        asked = EvaluationConfig(split=self.config.split, data=config.data, annotations=config.annotations, videos=config.videos, batch=config.batch,
                                 device=config.device, workers=config.workers, amp=config.amp, seed=config.seed,
                                 allow_missing=self.config.allow_missing)  # fmt: skip
        opened = open_run(asked, cell) if keys else None
        for key in keys:
            found = score(replace(asked, **SCORES[key]), opened)
            _write(score_file(cell, self.config.split, key), found | {"seconds": round(time.time() - started, 1)})
            started = time.time()

    def read(self, row: Row, key: str | None = None) -> dict[int, dict]:
        """What the seeds of a row came to, those that are there."""
        cells = {seed: cell_folder(self.config, row.flags, seed) for seed in range(self.config.seeds)}
        files = {seed: score_file(cell, self.config.split, key or row.score) for seed, cell in cells.items() if cell not in self.failed}
        return {seed: json.loads(file.read_text()) for seed, file in files.items() if file.exists()}

    def minutes(self, table: Table) -> float:
        """Minutes of training and scoring that a table's cells took."""
        cells = {cell_folder(self.config, row.flags, seed) for row in table.rows for seed in range(self.config.seeds)}
        contents = [json.loads(path.read_text()) for cell in cells for path in (*cell.glob("seconds.json"), *cell.glob("scores/*.json"))]
        return sum(content["seconds"] if isinstance(content, dict) else content for content in contents) / 60


def _first(score: str) -> str:
    return {"expected": "first, expected", "M=0": "first, M=0"}.get(score, "first")


def score_file(cell: Path, split: str, key: str) -> Path:
    """Where a cell's metrics under one way of scoring are."""
    return cell / "scores" / f"{split} {key}.json"


def _write(path: Path, content) -> None:
    data.write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def stale(config: Config) -> str:
    """What is wrong with a finished cell that was trained with other flags than these (a recipe or a default has changed since); else ""."""
    before = {**plain(preset(config.dataset, config.method, "paper")), **load_file(config.out / "best.pt")["config"]}
    changed = [f"{name} {before[name]} -> {value}" for name, value in plain(config).items() if name not in train.FREE and before[name] != value]
    return f"{config.out} was made with another config ({', '.join(changed)}): remove it, or name another --out" if changed else ""


def training_seconds(cell: Path) -> float:
    """Seconds of training by metrics.jsonl: the sum over the processes that a run took, whose clocks start anew."""
    total, before = 0.0, 0.0
    for row in read_log(cell):
        total += row["seconds"] - (before if row["seconds"] >= before else 0.0)
        before = row["seconds"]
    return total


@contextlib.contextmanager
def claim(cell: Path, wait: bool) -> Iterator[bool]:
    """Makes a cell this process's own until the block, or the process, ends. False where another has it; with `wait`, it is waited for."""
    cell.mkdir(parents=True, exist_ok=True)
    with (cell / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


# ----------------------------------------------------------------------------------------------------------------------------- scoring


def score(config: EvaluationConfig, opened: Opened) -> dict:
    """The metrics of one way to score; with one caption a clip, and without the leak, what the further analysis shows as well."""
    if config.captions == "first":
        opened = replace(opened, features=first_captions(opened.features))
    matrix, owner = score_all(config, opened), opened.features.owner
    found = dict(metrics=retrieval_metrics(matrix, owner), split=config.split, texts=len(owner), videos=len(opened.clips), listed=opened.listed,
                 machine=machine(config.device))  # fmt: skip
    if config.captions == "first" and config.protocol == "paper":
        found["panels"] = further_analysis(matrix, opened.model.logit_scale.exp().item(), config.batch)
    return found


def first_captions(features: Features) -> Features:
    """The features with one text a video: its first caption."""
    first = torch.cat([features.owner.new_ones(1, dtype=torch.bool), features.owner.diff() > 0])
    return Features(features.text[first], features.frames, features.owner[first])


EDGES = {PAIRS[0]: np.linspace(-0.5, 1, 76), PAIRS[1]: np.linspace(-0.5, 1, 76), PAIRS[2]: np.linspace(0, 15, 76)}


def further_analysis(scores: Float[Tensor, "n n"], scale: float, batch: int) -> dict:
    """Mean and histogram (per cent; the outermost bins hold what lies beyond) of what the paper's two panels show, text i belonging to video i.

        cosine of irrelevant pairs   s_ij, i != j               of relevant pairs   s_ii
        loss of relevant pairs       - (log softmax_j(scale s_ij)[i] + log softmax_j(scale s_ji)[i]) / 2, their terms of L_ce

    The softmax runs over batches of neighbours, as in training (over one smaller batch where there are fewer pairs)."""
    n, size = len(scores), min(batch, len(scores))
    blocks = [scale * scores[k : k + size, k : k + size] for k in range(0, n - size + 1, size)]
    losses = torch.cat([-(block.log_softmax(1).diag() + block.log_softmax(0).diag()) / 2 for block in blocks])
    panels = {}
    for (name, edges), values in zip(EDGES.items(), (scores[~torch.eye(n, dtype=torch.bool, device=scores.device)], scores.diag(), losses)):
        counts = np.histogram(values.double().clamp(edges[0], edges[-1]).cpu().numpy(), edges)[0]
        panels[name] = {"mean": values.mean().item(), "share": (100 * counts / len(values)).tolist()}
    return panels


# ----------------------------------------------------------------------------------------------------------------- tables and figures


def student_t(freedom: int, confidence: float = 0.95) -> float:
    """t with P(|T| <= t) = confidence, for Student's T: in T = sqrt(freedom) tan(a) the angle a has a density of cos(a)^(freedom - 1)."""
    angle = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    area = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(np.interp(confidence, area / area[-1], angle))


def paired_difference(values: dict[int, float], baseline: dict[int, float]) -> dict | None:
    """{"mean", "half", "seeds"} of values - baseline over the seeds of both: d, with the 95 % confidence interval d +- t_{n-1} std(d) / sqrt(n).

    None without a common seed, half None with one. The interval is over seeds: it says nothing of other test sets."""
    differences = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    n = len(differences)
    if n == 0:
        return None
    half = student_t(n - 1) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else None
    return {"mean": statistics.mean(differences), "half": half, "seeds": n}


def summary(jobs: Jobs, table: Table) -> dict[str, dict]:
    """{row: {"values": {metric: {seed: value}}, "differences": {metric: paired_difference}, "baseline": row or None}}."""
    content: dict[str, dict] = {}
    for row in table.rows:
        values: dict[str, dict[int, float]] = {}
        for seed, result in jobs.read(row).items():
            found = {f"{way} {metric}": value for way, metrics in result["metrics"].items() for metric, value in metrics.items()}
            for name, value in (found | {name: panel["mean"] for name, panel in result.get("panels", {}).items()}).items():
                values.setdefault(name, {})[seed] = value
        if table.leaks:
            for name, key in ((HONEST, _first(row.score)), (LEAKS, "LEAKS")):
                values[name] = {seed: result["metrics"]["t2v"]["R@1"] for seed, result in jobs.read(row, key).items()}
        baseline = row.baseline or table.rows[0].name
        content[row.name] = {"values": values, "baseline": None if baseline == row.name else baseline, "x": row.x}
    for row in content.values():
        base = content[row["baseline"]]["values"] if row["baseline"] else {}
        row["differences"] = {name: paired_difference(found, base[name]) for name, found in row["values"].items() if name in base}
    return content


def spread(values: Sequence[float], digits: int = 1) -> str:
    """mean +- std over seeds."""
    if not values:
        return "not run"
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def markdown(table: Table, content: dict[str, dict]) -> str:
    """The table: mean +- std over seeds, then paired differences to the baseline with their intervals, then the number of seeds."""

    def digits(name: str) -> int:
        return 3 if name in PAIRS else 1

    def difference(row: dict, name: str) -> str:
        found, d = row["differences"].get(name), digits(name)
        if row["baseline"] is None or found is None:
            return "-"
        interval = "" if found["half"] is None else f" [{found['mean'] - found['half']:+.{d}f}, {found['mean'] + found['half']:+.{d}f}]"
        return f"{found['mean']:+.{d}f}{interval}"

    columns = [*table.columns, *((HONEST, LEAKS) if table.leaks else ())]
    baselines = {row["baseline"] for row in content.values()} - {None}
    than = baselines.pop() if len(baselines) == 1 else "its baseline"
    lines = [["", *columns, *(f"{name}: difference to {than}, 95 % interval" for name in table.compared), "seeds"]]
    for name, row in content.items():
        cells = [spread([*row["values"].get(column, {}).values()], digits(column)) for column in columns]
        lines.append([name, *cells, *(difference(row, column) for column in table.compared), str(len(row["values"].get("t2v R@1", {})))])
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], f"|---|{'---:|' * (len(lines[0]) - 1)}", *rows[1:]])


def write(jobs: Jobs, name: str, command: str) -> Path:
    """NAME.md, NAME.json and reproduce_NAME.png of a table, from the cells that are there."""
    table, folder, config = jobs.tables[name], root(jobs.config), jobs.config
    content = summary(jobs, table)
    results = [result for row in table.rows for result in jobs.read(row).values()]
    folders = {cell_folder(config, row.flags, seed) for row in table.rows for seed in range(config.seeds)}
    failed = {cell.relative_to(folder).as_posix(): sentence for cell, sentence in jobs.failed.items() if cell in folders}
    about = dict(title=table.title, note=table.note, command=command, seeds=config.seeds, split=config.split, minutes=round(jobs.minutes(table), 2),
                 machine=sorted({result["machine"] for result in results}), failed=failed,
                 sizes=sorted({(result["texts"], result["videos"], result["listed"]) for result in results}))  # fmt: skip
    if name == "curves":
        for row in table.rows:
            content[row.name]["curves"] = curves_of(jobs, row)
    _write(folder / f"{name}.json", {**about, "rows": content})
    sizes = "; ".join(f"{texts} captions × {videos} videos" + (f" of {listed}" * (videos < listed)) for texts, videos, listed in about["sizes"])
    freeze = cell_config(config, table.rows[0].flags, 0).freeze
    parts = [
        f"### {table.title[0].upper() + table.title[1:]}", table.note, markdown(table, content), f"![{table.title}](reproduce_{name}.png)",
        f"`{command}`: {config.dataset}, {config.split} split, {sizes}, `--freeze {freeze}`, {config.seeds} seeds, mean ± std over them; "
        f"{about['minutes']:.0f} minutes of training and scoring (cells that other tables share included) on {', '.join(about['machine'])}.",
        f"Not complete: {len(failed)} cells failed, listed in {name}.json." if failed else "",
    ]  # fmt: skip
    text = "\n\n".join(part for part in parts if part) + "\n"
    data.write_whole(folder / f"{name}.md", text.encode())
    if results:
        figure(jobs, name, content)
    return folder / f"{name}.md"


def machine(device: str) -> str:
    """The machine, in a few words."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    gpu = torch.cuda.get_device_name() if choose_device(device).type == "cuda" else "no GPU"
    return (
        f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}, {torch.get_num_threads()} threads, {gpu}, torch {torch.__version__}"
    )


def curves_of(jobs: Jobs, row: Row) -> dict[str, dict[int, list]]:
    """{"training loss": {seed: [(step, value), ...]}, "validation R@1": ...} from the runs' metrics.jsonl; R@1 is text-to-video."""
    logs = {seed: read_log(cell_folder(jobs.config, row.flags, seed)) for seed in jobs.read(row)}
    loss = "L_s" if row.flags["method"] == "tmass" else "L_ce"
    return {"training loss": {seed: [(r["step"], r[loss]) for r in log if loss in r] for seed, log in logs.items()},
            "validation R@1": {seed: [(r["step"], r["val"]["t2v"]["R@1"]) for r in log if "val" in r] for seed, log in logs.items()}}  # fmt: skip


def figure(jobs: Jobs, name: str, content: dict) -> None:
    """reproduce_NAME.png: lines over an axis, the two panels, training curves, or else the seeds of each row as dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = jobs.tables[name]
    picture, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    if name == "analysis":
        for axis, panel in zip(axes, (PAIRS[0], PAIRS[2])):
            for row in table.rows:
                if found := jobs.read(row):
                    axis.stairs(np.mean([result["panels"][panel]["share"] for result in found.values()], axis=0), EDGES[panel], label=row.name)
            axis.set(xlabel=panel, ylabel="%")
    elif name == "curves":
        for number, (row, found) in enumerate(content.items()):
            for axis, (what, seeds) in zip(axes, found["curves"].items()):
                for line in (lines := [np.array(points, float) for points in seeds.values() if points]):
                    axis.plot(*line.T, color=f"C{number}", lw=0.5, alpha=0.5)
                if lines and len({line.shape for line in lines}) == 1:
                    axis.plot(*np.mean(lines, axis=0).T, "-" if what == "training loss" else "o-", color=f"C{number}", label=row)
                axis.set(xlabel="step", ylabel=what)
    for axis, metric in zip(axes, ("t2v R@1", "v2t R@1") if name not in ("analysis", "curves") else ()):
        rows = {row: found for row, found in content.items() if found["values"]}
        if table.axis:
            lines: dict[str, list] = {}
            for row, found in rows.items():
                label = row.rpartition(f"{table.axis} = ")[0].strip(", ") or "T-MASS, paper"
                lines.setdefault(label, []).append((found["x"], [*found["values"][metric].values()]))
            for label, points in lines.items():
                std = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in points]
                axis.errorbar([x for x, _ in points], [statistics.mean(values) for _, values in points], std, fmt="o-", capsize=3, label=label)
            axis.set(xlabel=table.axis, ylabel=metric)
        else:
            for y, found in enumerate(rows.values()):
                values = [*found["values"][metric].values()]
                axis.plot(values, [y] * len(values), "o", alpha=0.4, color=f"C{y}")
                axis.plot(statistics.mean(values), y, "|", ms=18, mew=2, color=f"C{y}")
            axis.set(yticks=range(len(rows)), yticklabels=rows if axis is axes[0] else [], xlabel=metric)
            axis.invert_yaxis()
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=8)
    picture.savefig(root(jobs.config) / f"reproduce_{name}.png", dpi=110)
    plt.close(picture)


# ------------------------------------------------------------------------------------------------------------------------ command line


def reproduce(config: ReproduceConfig, command: str = "python reproduce.py") -> Jobs:
    """Runs what is missing and writes the tables. Raises DataError and ModelError for what would stop every cell."""
    if config.seeds < 1:
        raise ModelError(f"--seeds {config.seeds}: give a number from 1 on; for an interval, from 2 on.")
    jobs = Jobs(config, {name: TABLES[name] for name in config.table})
    cell = next(iter(jobs.cells.values()))
    choose_device(config.device)
    data.of_split(data.read_clips(config.dataset, config.data, config.annotations, config.videos), config.split)
    if cell.arch == "tiny" and cell.weights is None:
        train.tiny_clip(replace(cell, method="xpool"))
    jobs.run()
    for name in jobs.tables:
        write(jobs, name, command)
    return jobs


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Anything wrong ends it with one sentence and exit code 1, cells that failed after all others are done."""
    import tyro

    arguments = sys.argv[1:] if arguments is None else arguments
    config = tyro.cli(ReproduceConfig, args=arguments, description=__doc__)
    try:
        jobs = reproduce(config, shlex.join(["python", "reproduce.py", *arguments]))
    except (DataError, ModelError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here.")
        sys.exit(130)
    print("\n".join((root(config) / f"{name}.md").read_text() for name in jobs.tables))
    if jobs.failed:
        cell, sentence = next(iter(jobs.failed.items()))
        sys.exit(f"error: {len(jobs.failed)} of {len(jobs.cells)} cells failed, the first: {cell}: {sentence}")


if __name__ == "__main__":
    main()
