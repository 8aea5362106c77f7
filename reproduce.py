"""Every experiment of the paper as a table or figure, on the given data set ("Experiments").

    python reproduce.py                                     # all of them on the built-in clips
    python reproduce.py --table recipes alpha --seeds 10
    python reproduce.py --dataset msrvtt --arch ViT-B/32

A row of a table is a set of training flags. It is trained once per seed, in a folder of its own (a cell), and
scored in every way that the tables ask for. Finished cells are not run again and stopped ones are resumed:
the same command continues, also with more tables or seeds. Several processes can run it at once, for instance
one per GPU; each takes cells that no other works on. A row is compared with its baseline seed by seed.
"""

import engine  # isort: skip  # noqa: F401  # before torch: it sets how OpenMP waits
import fcntl
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

import shapes
import train
from engine.analysis import (
    EDGES,
    PAIRS,
    clips_of,
    complexity,
    further_analysis,
    lines_by_scenes,
    markdown_table,
    noise_ratio,
    numbers_of_each,
    query_results,
    spread,
    uncertainty,
    with_intervals,
    written,
)
from engine.checkpoint import OTHER_TINY, other_tiny_clip, save_checkpoint, to_record
from engine.config import (
    METHODS,
    RECIPES,
    Config,
    EvaluationConfig,
    changes,
    preset,
    prior_of,
)
from engine.datasets import of_split, read_clips
from engine.distributed import choose_device
from engine.experiment import read_log
from engine.files import DataError, ModelError, write_atomic, writing
from engine.intervals import over_seeds, over_seeds_and_clips
from engine.metrics import first_hits
from engine.paper_tables import (
    DIGITS,
    END,
    HEADS,
    HONEST,
    LEAKS,
    QUERIES,
    RELEVANCE,
    SCORES,
    START,
    TABLES,
    Row,
    Table,
)
from engine.plots import plot_curves, plot_histograms, plot_rows, plot_uncertainty
from engine.weights import load_file
from evaluate import Opened, measure, open_run, score_all

Name = Literal[tuple(TABLES)]


@dataclass(frozen=True)
class ReproduceConfig:
    """Which experiments to run, on which data, and how often."""

    table: tuple[Name, ...] = tuple(TABLES)  # which tables; default: all of them
    seeds: int = 5  # runs of each row; an interval needs at least 2
    dataset: str = "shapes"  # as in train.py
    arch: str | None = None  # tiny, ViT-B/32, ViT-B/16 or a file; default: the data set's preset
    weights: Path | None = None  # as in train.py
    annotations: Path | None = None  # as in train.py
    videos: Path | None = None  # as in train.py
    data: Path = Path("data")  # as in train.py
    freeze: Literal["none", "vision", "clip"] | None = None  # default: clip on shapes, else the preset's
    split: Literal["test", "val", "second"] = "test"
    """make choices on val, report test; second: another test set of built-in clips, which confirms claims"""
    epochs: int | None = None  # passes over the captions; default: the preset's
    batch: int | None = None  # text-video pairs per step; default: the preset's
    max_steps: int | None = None  # stop each run after this many steps
    out: Path = Path("runs/reproduce")  # cells, tables and figures, in a folder for each data set and arch
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    workers: int | None = None  # processes that load batches in advance; default: the preset's
    allow_missing: bool = False  # as in evaluate.py


ADVICE = "free some space, or name another --out; finished cells are kept."
SCORED = "scores-3"  # folder of a cell's results; another number when metrics change: all is scored anew
RATIO = START.replace("\\", "")  # as the figure shows it
SETS = {"second": "shapes-second", "scenes": "shapes-scenes"}  # splits that are data sets of their own


def cell_config(config: ReproduceConfig, flags: dict, seed: int) -> Config:
    """Returns the training run of a row and a seed.

    The row's flags win over the recipe, the recipe over this command, this command over X-Pool's preset."""
    method, recipe = flags["method"], flags.get("recipe", "paper")
    fusion, radius = METHODS[method]
    named = dict(method=method, fusion=fusion, radius=radius, recipe=recipe, seed=seed, resume=True, M=20)
    names = ("arch", "weights", "annotations", "videos", "data", "freeze", "epochs", "batch", "max_steps")
    given = {name: getattr(config, name) for name in (*names, "device", "workers")}
    given = {name: value for name, value in given.items() if value is not None}
    best = RECIPES[recipe] if method == "tmass" else {}
    base = replace(preset(config.dataset, "xpool"), **{**named, **heads(config), **given, **best})
    augment = base.augment and flags.get("freeze", base.freeze) == "none"
    return replace(base, augment=augment, out=cell_folder(config, flags, seed), **flags)


def heads(config: ReproduceConfig) -> dict:
    """Returns HEADS where psi and R train alone on the built-in clips, else nothing."""
    return HEADS if config.dataset == "shapes" and config.freeze in (None, "clip") else {}


def root(config: ReproduceConfig) -> Path:
    """Returns the folder of the cells and tables of a data set and arch."""
    arch = config.arch or preset(config.dataset, "xpool").arch
    arch = Path(arch).stem if Path(arch).is_file() else arch
    return config.out / f"{config.dataset}-{arch}".replace("/", "").lower()


def cell_folder(config: ReproduceConfig, flags: dict, seed: int) -> Path:
    """Returns a cell's folder, named by its flags. Rows of several tables with the same flags share it.

    Flags at their defaults are left out of the name; with the best recipe, which has defaults of its own,
    only those of HEADS are."""
    default = vars(preset(config.dataset, "tmass")) | heads(config)
    known = default if flags.get("recipe", "paper") == "paper" else HEADS
    named = [name for name in flags if name not in known or flags[name] != default[name]]
    parts = [f"{name}={flags[name]}" for name in named if name != "method"]
    parts += [f"freeze={config.freeze}"] if config.freeze and "freeze" not in flags else []
    return root(config) / "-".join([flags["method"], *parts]) / f"seed{seed}"


# ------------------------------------------------------------------------------------------ running the cells


@dataclass
class Jobs:
    """The cells that the tables need, and the ways to score each; `failed`: why a cell has no result."""

    config: ReproduceConfig
    tables: dict[str, Table]
    cells: dict[Path, Config] = field(default_factory=dict)
    scores: dict[Path, set[tuple[str, str]]] = field(default_factory=dict)  # splits and keys of SCORES
    failed: dict[Path, str] = field(default_factory=dict)
    written: list[Path] = field(default_factory=list)  # the tables

    def __post_init__(self):
        for seed in range(self.config.seeds):  # seed by seed, so that rows can be compared early
            for table in self.tables.values():
                for row in table.rows:
                    cell = cell_config(self.config, row.flags, seed)
                    self.cells[cell.out] = cell
                    keys = {one_caption(row.score), "LEAKS"} if table.leaks else set()
                    keys |= {table.key(row)}
                    asked = {(self.split(table), key) for key in keys}
                    if table.scenes and self.config.dataset == "shapes":
                        asked |= {("scenes", table.key(row))}
                    self.scores.setdefault(cell.out, set()).update(asked)

    def split(self, table: Table) -> str:
        """Returns the split that a table is of."""
        return "val" if table.choice else self.config.split

    def missing(self, cell: Path) -> list[tuple[str, str]]:
        """Returns the ways to score a cell that have no result yet; neighbours share their scores."""
        todo = [way for way in self.scores[cell] if not score_file(cell, *way).exists()]
        return sorted(todo, key=lambda way: (way[0], way[1].removeprefix(QUERIES), way[1]))

    def run(self) -> None:
        """Trains and scores what is missing, cell by cell. Reports a cell that fails; the others go on."""
        todo = [cell for cell in self.cells if not (cell / "seconds.json").exists() or self.missing(cell)]
        done = [cell for cell in self.cells if cell not in todo]
        self.failed |= {cell: sentence for cell in done if (sentence := stale(self.cells[cell]))}
        print(f"{len(self.cells)} cells, {len(done)} of them finished, in {root(self.config)}", flush=True)
        with tqdm(total=len(todo), desc="cells", unit=" cells", smoothing=0, mininterval=0) as bar:
            for wait in (False, True):  # cells of other processes come last
                todo = [cell for cell in todo if not self.run_cell(cell, wait, bar)]

    def run_cell(self, cell: Path, wait: bool, bar: tqdm) -> bool:
        """Runs a cell and reports a failure. Returns False if another process has it (never with `wait`)."""
        with claim(cell, wait) as mine:
            if not mine:
                return False
            bar.set_postfix_str(str(cell.relative_to(root(self.config))))
            if sentence := self.attempt(cell):
                self.failed[cell] = sentence
                bar.write(f"failed: {cell}: {sentence}", file=sys.stderr)
        bar.update()
        return True

    def attempt(self, cell: Path) -> str:
        """Does what is missing of a cell; its output goes to its log.txt. Returns "" or why it failed."""
        with (cell / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            try:
                self.train_and_score(cell)
            except (DataError, ModelError) as error:
                return str(error)
            except Exception as error:  # out of memory, a bug: the other cells go on
                return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        return ""

    def train_and_score(self, cell: Path) -> None:
        """Trains and scores a cell; its numbers depend on its config alone. Raises the errors of both."""
        config, started = self.cells[cell], time.time()
        if not (cell / "seconds.json").exists():
            if config.method == config.freeze == "clip":  # mean pooling of fixed features: nothing to learn
                save_checkpoint(cell / "best.pt", train.build(config), config=to_record(config))
            else:
                train.train(config)
            _write(cell / "seconds.json", round(max(time.time() - started, training_seconds(cell)), 1))
        if sentence := stale(config):
            raise ModelError(sentence)
        names = ("data", "annotations", "videos", "batch", "device", "workers", "seed")
        asked = {name: getattr(config, name) for name in names}
        asked |= dict(amp="off", allow_missing=self.config.allow_missing)
        for split, ways in itertools.groupby(self.missing(cell), key=lambda way: way[0]):
            started, last = time.time(), (None, None)
            where = dict(split="test", dataset=SETS[split]) if split in SETS else dict(split=split)
            opened = open_run(EvaluationConfig(**asked, **where), cell)
            for _, key in ways:
                flags = SCORES[key.removeprefix(QUERIES)]
                evaluation = EvaluationConfig(**asked, **where, **flags)
                found, matrix = score(evaluation, opened, last[1] if flags == last[0] else None)
                if key.startswith(QUERIES):
                    found |= of_queries(evaluation, opened, matrix, config)
                found |= dict(split=split, seconds=round(time.time() - started, 1))
                _write(score_file(cell, split, key), found)
                started, last = time.time(), (flags, matrix)

    def read(self, row: Row, key: str | None = None, split: str | None = None) -> dict[int, dict]:
        """Returns {seed: result} of a row, for the seeds that have one. key, split: of the result."""
        found = {}
        for seed in range(self.config.seeds):
            cell = cell_folder(self.config, row.flags, seed)
            file = score_file(cell, split or self.config.split, key or row.score)
            if cell not in self.failed and file.exists():
                found[seed] = json.loads(file.read_text())
        return found

    def cells_of(self, table: Table) -> set[Path]:
        """Returns the cells of a table's rows."""
        seeds = range(self.config.seeds)
        return {cell_folder(self.config, row.flags, seed) for row in table.rows for seed in seeds}


def one_caption(score: str) -> str:
    """Returns the key of SCORES that scores in the same way, with one caption a clip."""
    return {"delta": "first, delta", "M=0": "first, M=0"}.get(score, "first")


def score_file(cell: Path, split: str, key: str) -> Path:
    """Returns the file of a cell's result under one way to score it."""
    return cell / SCORED / f"{split} {key}.json"


def seconds_of(cell: Path) -> float:
    """Returns the seconds that a cell's training and scoring took."""
    training = [json.loads(file.read_text()) for file in cell.glob("seconds.json")]
    scoring = [json.loads(file.read_text())["seconds"] for file in cell.glob(f"{SCORED}/*.json")]
    return float(sum(training + scoring))


def _write(path: Path, content) -> None:
    text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
    with writing(path, DataError, ADVICE):
        write_atomic(path, text.encode())


def stale(config: Config) -> str:
    """Returns "" if a finished cell has this config, else a sentence that names the changed flags.

    This happens when a recipe or a default changes. Flags in FREE may differ."""
    trained = load_file(config.out / "best.pt")["config"]
    changed = ", ".join(changes(config, trained))
    what = f"was made with another config ({changed})" if changed else ""
    what = OTHER_TINY if other_tiny_clip(trained) else what
    return f"{config.out} {what}: remove it, or name another --out" if what else ""


def training_seconds(cell: Path) -> float:
    """Returns the seconds of training by metrics.jsonl: its clock starts again whenever a run is resumed."""
    seconds = [row["seconds"] for row in read_log(cell)]
    return float(sum(now for now, later in zip(seconds, [*seconds[1:], 0.0]) if later < now))


@contextmanager
def claim(cell: Path, wait: bool) -> Iterator[bool]:
    """Locks a cell until the block or the process ends. Yields False, or waits, if another process has it."""
    cell.mkdir(parents=True, exist_ok=True)
    with (cell / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        yield mine


# ---------------------------------------------------------------------------------------------------- scoring


def score(
    config: EvaluationConfig, opened: Opened, matrix: Float[Tensor, "texts videos"] | None = None
) -> tuple[dict, Float[Tensor, "texts videos"]]:
    """Returns the metrics of one way to score, with one caption a clip also those of the further analysis,
    and the scores. matrix: the scores, where they are known."""
    if config.captions == "first":  # of the texts of a video, which are neighbours
        owner = opened.features.owner
        first = torch.cat([owner.new_ones(1, dtype=torch.bool), owner.diff() > 0])
        features = replace(opened.features, text=opened.features.text[first], owner=owner[first])
        relevant = None if opened.relevant is None else opened.relevant[first.cpu()]
        opened = replace(opened, features=features, relevant=relevant)
    matrix = score_all(config, opened) if matrix is None else matrix
    found = dict(metrics=measure(config, opened, matrix), split=config.split, machine=machine(config.device))
    found |= dict(texts=matrix.shape[0], videos=matrix.shape[1], listed=opened.listed)
    hits = first_hits(matrix, opened.features.owner)
    found["first hits"] = {way: " ".join(f"{hit:g}" for hit in each.tolist()) for way, each in hits.items()}
    found["owner"] = " ".join(map(str, opened.features.owner.tolist()))
    if config.captions == "first" and config.protocol == "paper":
        found["panels"] = further_analysis(matrix, opened.model.logit_scale.exp().item(), config.batch)
    return found, matrix


def of_queries(config: EvaluationConfig, opened: Opened, matrix: Tensor, trained: Config) -> dict:
    """Returns the numbers of each query (query_results), those of the mass before and after training, and the
    number of scenes of each clip, where it differs."""
    model, features, prior = opened.model, opened.features, prior_of(config, opened.trained, opened.dataset)
    sizes = features.text, features.frames, features.owner
    found = {"queries": written(query_results(model, *sizes, matrix, opened.relevant, **prior))}
    if model.radius is not None:
        models = {START: train.build(trained).to(matrix.device).eval(), END: model}
        found["numbers"] = {name: noise_ratio(each, *sizes, **prior) for name, each in models.items()}
    if kinds := shapes.TEST_SETS.get(opened.dataset, {}).get("scenes"):
        numbers = [int(clip.path.stem.removeprefix("clip")) for clip in opened.clips]
        found["scenes"] = " ".join(str(kinds[number % len(kinds)]) for number in numbers)
    return found


def machine(device: str) -> str:
    """Describes the machine: cores, threads, GPU and version of torch."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cpu = f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}"
    gpu = torch.cuda.get_device_name() if choose_device(device).type == "cuda" else "no GPU"
    return f"{cpu}, {torch.get_num_threads()} threads, {gpu}, torch {torch.__version__}"


# ----------------------------------------------------------------------------------------- tables and figures


def clip_interval(
    name: str, found: Mapping[int, dict], baseline: Mapping[int, dict]
) -> tuple[float, float] | None:
    """Returns the 95 % interval over seeds and clips of the difference of two rows in a metric.

    found, baseline: the results of each seed. None for metrics other than R@1 whose numbers of each query are
    not known, without a common seed, or where the rows have other queries."""
    seeds = sorted(found.keys() & baseline.keys())
    if not seeds or found[seeds[0]]["owner"] != baseline[seeds[0]]["owner"]:
        return None
    of_each = [numbers_of_each(rows[seed], name) for rows in (found, baseline) for seed in seeds]
    if not all(of_each):
        return None
    hits, clips = np.array(of_each, float).reshape(2, len(seeds), -1), clips_of(found[seeds[0]], name)
    return over_seeds_and_clips(*hits, clips) if len(np.unique(clips)) > 1 else None


def summary(jobs: Jobs, table: Table, split: str | None = None) -> dict[str, dict]:
    """Returns of each row "values" {metric: {seed: value}}, "differences" {metric: over_seeds, and "clips":
    clip_interval} and others. split: another one than that of the command."""
    content: dict[str, dict] = {}
    split = split or jobs.split(table)
    results = {row.name: jobs.read(row, table.key(row), split) for row in table.rows}
    for row in table.rows:
        values: dict[str, dict[int, float]] = {}
        for seed, result in results[row.name].items():
            for name, panel in result.get("panels", {}).items():
                values.setdefault(name, {})[seed] = panel["mean"]
            for name, value in result.get("numbers", {}).items():
                values.setdefault(name, {})[seed] = value
            for way, metrics in result["metrics"].items():
                for name, value in metrics.items():
                    values.setdefault(f"{way} {name}", {})[seed] = value
        for name, key in ((HONEST, one_caption(row.score)), (LEAKS, "LEAKS")) if table.leaks else ():
            found = jobs.read(row, key, split)
            values[name] = {seed: result["metrics"]["t2v"]["R@1"] for seed, result in found.items()}
        base = row.baseline or table.rows[0].name
        content[row.name] = {"values": values, "baseline": base if base != row.name else None, "x": row.x}
    for row in content.values():
        baseline = content[row["baseline"]]["values"] if row["baseline"] else {}
        both = [name for name in row["values"] if name in baseline]
        row["differences"] = {name: over_seeds(row["values"][name], baseline[name]) for name in both}
    for row, own in content.items():
        for name in {*table.compared} & own["differences"].keys():
            if own["differences"][name] is not None:
                clips = clip_interval(name, results[row], results[own["baseline"]])
                own["differences"][name]["clips"] = clips
    return content


def markdown(table: Table, content: dict[str, dict]) -> str:
    """Returns the table: mean ± std over seeds, differences to the baseline, number of seeds."""
    known = {name for row in content.values() for name in row["values"]}
    columns = [*table.columns, *((HONEST, LEAKS) if table.leaks else ())]
    columns += [name for name in RELEVANCE if name in known and name not in columns]
    baselines = {row["baseline"] for row in content.values()} - {None}
    than = baselines.pop() if len(baselines) == 1 else "its baseline"
    over = "95 % interval over seeds (over seeds and clips)"
    compared = [f"{name}: difference to {than}, {over}" for name in table.compared]
    lines = [["", *columns, *compared, "seeds"]]
    for name, row in content.items():
        seen = {column: [*row["values"].get(column, {}).values()] for column in columns}
        values = [spread(seen[column], DIGITS.get(column, 1)) for column in columns]
        seeds = len(row["values"].get("t2v R@1", {}))
        lines.append([name, *values, *(difference(row, column) for column in table.compared), str(seeds)])
    return markdown_table(lines)


def difference(row: dict, name: str) -> str:
    """Returns the difference of a row to its baseline."""
    return with_intervals(row["differences"].get(name) if row["baseline"] else None, DIGITS.get(name, 1))


def beside(table: Table, test: dict[str, dict], second: dict[str, dict]) -> str:
    """Returns the table of the differences on both test sets."""
    lines = [["difference", *(f"{name}: {on}" for name in table.compared for on in ("test", "second"))]]
    for name, row in second.items():
        both = [difference(each, column) for column in table.compared for each in (test[name], row)]
        lines += [[name, *both]] if row["baseline"] else []
    return markdown_table(lines)


def write(jobs: Jobs, name: str, command: str) -> Path:
    """Writes NAME.md, NAME.json and reproduce_NAME.png of a table from finished cells. Returns NAME.md.

    With another split than test, NAME is followed by it: NAME-second.md."""
    table, folder, config = jobs.tables[name], root(jobs.config), jobs.config
    content, analysis, further = summary(jobs, table), *analyse(jobs, name)
    split = jobs.split(table)
    file = name if split == "test" else f"{name}-{split}"
    if split == "second":
        further = beside(table, summary(jobs, table, "test"), content) + ("\n\n" + further if further else "")
    for row in table.rows if name == "curves" else ():
        content[row.name]["curves"] = curves_of(jobs, row)
    results = [found for row in table.rows for found in jobs.read(row, table.key(row), split).values()]
    cells = jobs.cells_of(table)
    failed = {str(cell.relative_to(folder)): why for cell, why in jobs.failed.items() if cell in cells}
    machines = sorted({result["machine"] for result in results})
    sizes = sorted({(result["texts"], result["videos"], result["listed"]) for result in results})
    minutes = sum(map(seconds_of, cells)) / 60
    about = dict(title=table.title, note=table.note, command=command, seeds=config.seeds, split=split)
    about |= dict(minutes=round(minutes, 2), machine=machines, failed=failed, sizes=sizes)
    _write(
        folder / f"{file}.json", {**about, "rows": content, **({"analysis": analysis} if analysis else {})}
    )
    of = [f"{t} captions × {v} videos" + (f" of {listed}" if v < listed else "") for t, v, listed in sizes]
    freeze = cell_config(config, table.rows[0].flags, 0).freeze
    parts = [
        f"### {table.title[0].upper() + table.title[1:]}",
        table.note,
        markdown(table, content),
        further,
        f"![{table.title}](reproduce_{file}.png)",
        f"`{command}`: {config.dataset}, {split} split, {'; '.join(of)}, `--freeze {freeze}`, "
        f"{config.seeds} seeds, mean ± std over them; {minutes:.0f} minutes of training and scoring (cells "
        f"shared with other tables included) on {', '.join(machines)}.",
        f"Not complete: {len(failed)} cells failed, listed in {file}.json." if failed else "",
    ]
    _write(folder / f"{file}.md", "\n\n".join(part for part in parts if part) + "\n")
    if results:
        picture = folder / f"reproduce_{file}.png"
        with writing(picture, DataError, ADVICE):
            figure(jobs, name, content, picture, analysis)
    return folder / f"{file}.md"


def analyse(jobs: Jobs, name: str) -> tuple[dict, str]:
    """Returns what engine/analysis.py finds for a table: the content of its file, and markdown."""
    table = jobs.tables[name]
    results = {row.name: jobs.read(row, table.key(row)) for row in table.rows}
    if name == "uncertainty":
        return uncertainty(results)
    if name != "complexity":
        return {}, ""
    more = {row.name: jobs.read(row, table.key(row), "scenes") for row in table.rows}
    scenes = next((result["scenes"] for found in more.values() for result in found.values()), None)
    return complexity(results, more, None if scenes is None else np.array(scenes.split(), int))


def curves_of(jobs: Jobs, row: Row) -> dict[str, dict[int, list]]:
    """Returns {"training loss": {seed: [(step, value), ...]}, "validation R@1": ...} of a row's runs."""
    loss = "L_s" if row.flags["method"] == "tmass" else "L_ce"
    losses, recall = {}, {}
    for seed in jobs.read(row):
        log = read_log(cell_folder(jobs.config, row.flags, seed))
        losses[seed] = [(r["step"], r[loss]) for r in log if loss in r]
        recall[seed] = [(r["step"], r["val"]["t2v"]["R@1"]) for r in log if "val" in r]
    return {"training loss": losses, "validation R@1": recall}


def figure(jobs: Jobs, name: str, content: dict[str, dict], path: Path, analysis: dict) -> None:
    """Draws a table: its panels, training curves, or recall of each row. analysis: what `analyse` returns."""
    table = jobs.tables[name]
    if name == "analysis":
        panels: dict[str, dict] = {PAIRS[0]: {}, PAIRS[2]: {}}
        for row in table.rows:
            found = [result["panels"] for result in jobs.read(row).values()]
            for panel, rows in panels.items() if found else ():
                rows[row.name] = np.mean([each[panel]["share"] for each in found], axis=0).tolist()
        plot_histograms(path, panels, EDGES)
    elif name == "curves":
        plot_curves(path, {row: found["curves"] for row, found in content.items()})
    elif name == "uncertainty":
        plot_uncertainty(path, analysis)
    elif name == "complexity" and "scenes" in analysis:
        plot_rows(path, *lines_by_scenes(analysis["scenes"]), "scenes")
    else:
        metrics, measured, rows, x = ("t2v R@1", "v2t R@1"), name == "radius-scale", {}, {}
        for row, found in content.items():  # a ratio that was measured stands in place of the flag
            values, label = found["values"], row.replace(table.axis, RATIO) if measured else row
            rows[label] = {metric: [*values.get(metric, {}).values()] for metric in metrics}
            x[label] = statistics.mean(values[START].values()) if measured and values else found["x"]
        axis = RATIO if measured else table.axis
        plot_rows(path, rows, metrics, x if axis else None, axis, log=measured)


# ----------------------------------------------------------------------------------------------- command line


def reproduce(config: ReproduceConfig, command: str = "python reproduce.py") -> Jobs:
    """Runs what is missing and writes the tables. Raises DataError, ModelError if no cell could run."""
    if config.seeds < 1:
        raise ModelError(f"--seeds {config.seeds}: give a number from 1 on; for an interval, from 2 on.")
    choose_device(config.device)
    if config.split == "second" and config.dataset != "shapes":
        raise ModelError("--split second is a set of built-in clips: leave it out, or use --dataset shapes.")
    split, dataset = ("test", SETS["second"]) if config.split == "second" else (config.split, config.dataset)
    of_split(read_clips(dataset, config.data, config.annotations, config.videos), split)
    jobs = Jobs(config, {name: TABLES[name] for name in config.table})
    jobs.run()
    jobs.written = [write(jobs, name, command) for name in jobs.tables]
    return jobs


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. An error ends it with one sentence and exit code 1, failed cells after all others."""
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
    print("\n".join(path.read_text() for path in jobs.written))
    if jobs.failed:
        cell, sentence = next(iter(jobs.failed.items()))
        failed = f"{len(jobs.failed)} of {len(jobs.cells)} cells failed"
        sys.exit(f"error: {failed}, the first: {cell}: {sentence}")


if __name__ == "__main__":
    main()
