"""reproduce.py: statistics, cells, tables."""

import itertools
import json
import math
import statistics
from dataclasses import replace

import pytest
import torch
from conftest import randn

import reproduce
from engine.config import RECIPES, Config, preset
from engine.controls import CONTROLS
from engine.files import DataError, ModelError
from engine.intervals import over_seeds
from model import RADII
from reproduce import (
    HONEST,
    LEAKS,
    PAIRS,
    SCORES,
    TABLES,
    ReproduceConfig,
    Row,
    Table,
    cell_config,
    cell_folder,
    claim,
    further_analysis,
    main,
    score_file,
    training_seconds,
)

XPOOL, TMASS = {"method": "xpool"}, {"method": "tmass"}
ONE = Table("one run", (Row("X-Pool", XPOOL), Row("T-MASS, t", TMASS, "M=0"), Row("T-MASS", TMASS)))


@pytest.fixture
def config(clips_folder, weights, tmp_path) -> ReproduceConfig:
    """Two steps a run, on the 24 clips of the tests."""
    return ReproduceConfig(
        table=("recipes",),
        seeds=2,
        dataset="csv",
        arch="tiny",
        weights=weights,
        annotations=clips_folder / "clips.csv",
        videos=clips_folder / "clips",
        data=tmp_path / "data",
        freeze="clip",
        batch=8,
        max_steps=2,
        out=tmp_path / "out",
        device="cpu",
    )


@pytest.fixture
def one(monkeypatch):
    """A single table of two runs a seed, one of them scored in two ways."""
    monkeypatch.setattr(reproduce, "TABLES", {"recipes": ONE})


# ------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("seeds, t", [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042)])
def test_intervals_use_students_t_of_the_printed_tables(seeds, t):
    values = {seed: float(seed**2) for seed in range(seeds)}
    found = over_seeds(values, dict.fromkeys(values, 0.0))
    std = statistics.stdev(values.values())
    assert found["half"] / (std / math.sqrt(seeds)) == pytest.approx(t, abs=6e-4)


def test_over_seeds_equals_a_computation_by_hand():
    """Differences 1, 2, 6: mean 3, std sqrt(7), t_2 = 4.303."""
    found = over_seeds({0: 11.0, 1: 12.0, 4: 16.0, 5: 99.0}, {4: 10.0, 0: 10.0, 1: 10.0, 7: -99.0})
    assert found["mean"] == 3 and found["seeds"] == 3
    assert found["half"] == pytest.approx(4.303 * math.sqrt(7) / math.sqrt(3), rel=1e-3)
    assert over_seeds({0: 5.0}, {0: 7.0}) == {"mean": -2, "half": None, "seeds": 1}
    assert over_seeds({0: 5.0}, {1: 7.0}) is None


def test_variance_that_both_rows_share_is_not_in_the_interval():
    base = dict(enumerate([0.0, 7.0, -3.0, 4.0]))
    found = over_seeds({seed: x + 1 for seed, x in base.items()}, base)
    assert found == {"mean": 1, "half": 0, "seeds": 4}


def test_panels_equal_their_loops():
    n, size, scale = 7, 3, 5.0
    scores = torch.tanh(randn(n, n))
    found = further_analysis(scores, scale, size)
    irrelevant = [scores[i, j].item() for i in range(n) for j in range(n) if i != j]
    losses = []
    for i in range(6):  # two whole batches of three; the seventh pair is left over
        batch = range(i // size * size, i // size * size + size)
        own = scale * scores[i, i].item()
        row = [scale * scores[i, j].item() for j in batch]
        column = [scale * scores[j, i].item() for j in batch]
        losses.append(sum(math.log(sum(map(math.exp, line))) - own for line in (row, column)) / 2)
    assert found[PAIRS[0]]["mean"] == pytest.approx(statistics.mean(irrelevant), abs=1e-5)
    assert found[PAIRS[1]]["mean"] == pytest.approx(scores.diag().mean().item(), abs=1e-5)
    assert found[PAIRS[2]]["mean"] == pytest.approx(statistics.mean(losses), abs=1e-5)
    assert all(sum(panel["share"]) == pytest.approx(100) for panel in found.values())  # each value: one bin


# ----------------------------------------------------------------------------------------------------- cells


def test_rows_differ_in_their_own_flags_only(config):
    """X-Pool and every T-MASS run have the same epochs, rates and batch. Equal flags share a folder."""
    rows = [row for table in TABLES.values() for row in table.rows]
    base = vars(cell_config(config, XPOOL, 1))
    for row in rows:
        cell = vars(cell_config(config, row.flags, 1))
        own = {"method", "fusion", "radius", "recipe", "out", *row.flags}
        own |= set(RECIPES["best"]) if row.flags.get("recipe") == "best" else set()
        assert all(cell[name] == base[name] for name in cell if name not in own)
        assert all(cell[name] == value for name, value in row.flags.items()) and row.score in SCORES
    cells = [cell_config(config, row.flags, 0) for row in rows]
    runs = [replace(cell, out=None) for cell in cells]
    for (a, run), (b, other) in itertools.combinations(zip(cells, runs), 2):
        assert (a.out == b.out) == (run == other)  # each run once


def test_a_method_sets_psi_and_R_and_a_row_may_choose_others(config):
    def parts(flags):
        cell = cell_config(config, flags, 0)
        return cell.fusion, cell.radius, cell.out.parent.name

    assert parts({"method": "clip"}) == ("mean", "none", "clip-freeze=clip")
    assert parts(XPOOL) == ("xpool", "none", "xpool-freeze=clip")
    assert parts(TMASS) == ("xpool", "linear", "tmass-freeze=clip")
    assert parts({**TMASS, "fusion": "mean"}) == ("mean", "linear", "tmass-fusion=mean-freeze=clip")
    assert parts({**TMASS, "recipe": "best"}) == ("xpool", "joint", "tmass-recipe=best-freeze=clip")


def test_cells_of_the_tables_keep_their_folders():
    """Runs that were finished before psi and R were chosen apart are found again."""
    rows = [row for name, table in TABLES.items() if name != "search" for row in table.rows]
    assert {cell_folder(ReproduceConfig(), row.flags, 3).parent.name for row in rows} == {
        "clip", "xpool", "xpool-num_frames=4", "xpool-num_frames=8",
        "tmass", "tmass-num_frames=4", "tmass-num_frames=8",
        "tmass-radius=fixed", "tmass-radius=scalar", "tmass-radius=joint",
        "tmass-alpha=0.0", "tmass-alpha=0.0-ce=1.0", "tmass-alpha=0.4", "tmass-alpha=0.8", "tmass-alpha=1.6",
        "tmass-alpha=2.0", "tmass-recipe=best", "tmass-recipe=best-M=1", "tmass-recipe=best-ce=0.0",
        "tmass-recipe=best-radius=linear-radius_lr=0.01",
        *(f"tmass-radius=none-radius_lr=0.001-fusion={name}" for name in CONTROLS),
        *(f"tmass-initial_radius={radius}" for radius in (0.05, 0.15, 0.4, 2.0, 5.0)),
        "tmass-radius=relative-initial_radius=0.3", "tmass-radius=bounded-initial_radius=0.3",
        "tmass-radius=none-radius_lr=0.001-fusion=two-masses", "tmass-inclusion=1.0",
        "tmass-radius=relative-initial_radius=0.3-inclusion=1.0",
        *(f"tmass-recipe=best-{flags}" for flags in (
            "pairs=draws", "pairs=soft", "radius=bounded-initial_radius=0.3",
            "radius=bounded-initial_radius=0.3-pairs=draws", "inclusion=0.1",
        )),
        *(f"{name}-freeze=vision-epochs=2-clip_lr=0.0001" for name in (
            "xpool", "tmass", "tmass-recipe=best", "tmass-recipe=best-M=1",
        )),
    }  # fmt: skip


def test_the_table_of_radii_has_the_papers_forms():
    kinds = [row.flags["radius"] for row in TABLES["radius"].rows[1:]]
    assert kinds == ["fixed", "scalar", "linear"] and set(kinds) < set(RADII)


def test_only_the_built_in_clips_train_psi_and_R_alone():
    assert cell_config(ReproduceConfig(), XPOOL, 0).freeze == "clip"
    real = cell_config(ReproduceConfig(dataset="msrvtt", arch="ViT-B/32"), TMASS, 0)
    assert real == replace(preset("msrvtt", "tmass", "paper"), arch="ViT-B/32", out=real.out, resume=True)
    assert real.freeze == "none"


def test_recipe_is_a_preset_of_tmass_alone():
    assert preset("csv", "tmass", "paper") == replace(Config(), dataset="csv")
    best = replace(Config(), dataset="csv", recipe="best", **RECIPES["best"])
    assert preset("csv", "tmass", "best") == best
    xpool = dict(method="xpool", fusion="xpool", radius="none")
    assert preset("csv", "xpool", "best") == replace(Config(), dataset="csv", recipe="best", **xpool)


def test_the_papers_recipe_is_the_default_of_every_data_set():
    for dataset in ("shapes", "csv", "msrvtt"):
        assert (
            preset(dataset, "tmass") == preset(dataset, "tmass", "paper") != preset(dataset, "tmass", "best")
        )


def test_training_time_adds_up_over_resumptions(tmp_path):
    """The clock of metrics.jsonl starts again at each resumption."""
    rows = [{"step": step, "seconds": s} for step, s in enumerate([1.0, 2.0, 2.0, 0.5, 4.0, 0.25])]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert training_seconds(tmp_path) == 2 + 4 + 0.25
    assert training_seconds(tmp_path / "nothing") == 0


def numbers(config: ReproduceConfig) -> dict:
    """The metrics of every cell and way to score it, by file."""
    root = reproduce.root(config)
    files = sorted(root.glob(f"*/seed*/{reproduce.SCORED}/*.json"))
    return {str(path.relative_to(root)): json.loads(path.read_text())["metrics"] for path in files}


@pytest.mark.slow
def test_finished_cells_are_not_run_again_and_a_stopped_one_is_resumed(config, one, monkeypatch, capsys):
    ran, train = [], reproduce.train.train

    def counted(cell):
        ran.append(f"{cell.method} {cell.seed}")
        if len(ran) == 3:
            raise KeyboardInterrupt
        return train(cell)

    monkeypatch.setattr(reproduce.train, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        reproduce.reproduce(config)
    reproduce.reproduce(config)
    assert ran == ["xpool 0", "tmass 0", "xpool 1", "xpool 1", "tmass 1"]  # seed by seed
    before = numbers(config)
    monkeypatch.setattr(reproduce, "open_run", None)  # nothing is opened or scored
    reproduce.reproduce(config)
    assert len(ran) == 5 and numbers(config) == before and len(before) == 2 * 3
    assert "4 cells, 4 of them finished" in capsys.readouterr().out


@pytest.mark.slow
def test_no_number_of_a_cell_depends_on_other_cells(config, tmp_path, one, monkeypatch):
    reproduce.reproduce(config)
    together = numbers(config)
    monkeypatch.setattr(reproduce, "TABLES", {"recipes": Table("alone", (ONE.rows[2],))})
    alone = replace(config, out=tmp_path / "alone")
    jobs = reproduce.Jobs(alone, reproduce.TABLES)
    cell = cell_folder(alone, ONE.rows[2].flags, 1)
    cell.mkdir(parents=True)
    assert jobs.attempt(cell) == ""
    assert len(numbers(alone)) == 1 and numbers(alone).items() <= together.items()


def test_cells_from_before_psi_and_R_were_chosen_apart_count_as_finished(config, one, monkeypatch):
    """Their configs say "radius": "linear" for every method, and have no "fusion"."""
    config = replace(config, seeds=1)
    reproduce.reproduce(config)
    for path in reproduce.root(config).glob("*/seed*/best.pt"):
        content = torch.load(path, weights_only=True)
        content["config"] = {**content["config"], "radius": "linear"}
        del content["config"]["fusion"]
        torch.save(content, path)
    monkeypatch.setattr(reproduce.train, "train", None)
    assert not reproduce.reproduce(config).failed


def test_cells_that_were_scored_by_older_metrics_are_scored_anew_and_not_trained(config, one, monkeypatch):
    config = replace(config, seeds=1)
    reproduce.reproduce(config)
    found = numbers(config)
    for folder in reproduce.root(config).glob(f"*/seed*/{reproduce.SCORED}"):
        folder.rename(folder.with_name("scores"))
    monkeypatch.setattr(reproduce.train, "train", None)
    assert not reproduce.reproduce(config).failed and numbers(config) == found


def test_a_finished_cell_of_another_config_is_reported_and_not_shown(config, one):
    reproduce.reproduce(replace(config, seeds=1))
    jobs = reproduce.reproduce(replace(config, seeds=1, max_steps=1))
    assert len(jobs.failed) == 2
    for sentence in jobs.failed.values():
        assert "was made with another config (max_steps 2 -> 1)" in sentence
    assert "not run" in (reproduce.root(config) / "recipes.md").read_text()


def test_a_cell_that_fails_is_reported_in_one_sentence_and_the_others_go_on(config, monkeypatch, one, capsys):
    train = reproduce.train.train

    def broken(cell):
        if cell.method == "tmass" and cell.seed == 0:
            raise RuntimeError("out of memory\nsecond line")
        return train(cell)

    monkeypatch.setattr(reproduce.train, "train", broken)
    names = ["seeds", "dataset", "arch", "weights", "annotations", "videos", "data", "freeze", "batch"]
    arguments = ["--table", "recipes"]
    for name in (*names, "max_steps", "out", "device"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    cell = cell_folder(config, TMASS, 0)
    assert str(ended.value) == f"error: 1 of 4 cells failed, the first: {cell}: RuntimeError: out of memory"
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("| X-Pool", "| T-MASS"))]
    assert [row.split("|")[-2].strip() for row in rows] == ["2", "1", "1"]  # seeds


def test_cells_are_scored_on_the_second_set_without_training_and_beside_the_first(config, one, monkeypatch):
    """The second set is the test split here, so all numbers are equal."""
    config = replace(config, seeds=1)
    reproduce.reproduce(config)
    monkeypatch.setattr(reproduce.train, "train", None)
    monkeypatch.setattr(reproduce, "SETS", {"second": "csv"})
    jobs = reproduce.Jobs(replace(config, split="second"), {"recipes": ONE})
    jobs.run()
    file = reproduce.write(jobs, "recipes", "a command")
    assert not jobs.failed and file.name == "recipes-second.md"
    lines = [line.split("|") for line in file.read_text().splitlines() if line.startswith("| T-MASS")]
    rows = [line for line in lines if len(line) == 2 + 1 + 4]
    assert len(rows) == 2 and all(row[2] == row[3] != row[4] or row[4] == row[5] for row in rows)
    cell = cell_folder(config, TMASS, 0)
    test, second = (json.loads(score_file(cell, on, "M=20").read_text()) for on in ("test", "second"))
    assert test["metrics"] == second["metrics"] and second["split"] == "second"


def test_numbers_of_each_query_are_those_of_the_same_scores(config, monkeypatch):
    rows = (Row("X-Pool", XPOOL), Row("T-MASS", TMASS, "M=20"))
    tables = {"recipes": Table("one", rows), "uncertainty": Table("two", rows, queries=True)}
    monkeypatch.setattr(reproduce, "TABLES", tables)
    monkeypatch.setattr(
        reproduce, "score_all", lambda *given, f=reproduce.score_all: calls.append(1) or f(*given)
    )
    calls = []
    jobs = reproduce.reproduce(replace(config, seeds=1, table=tuple(tables)))
    cell = cell_folder(config, TMASS, 0)
    plain, each = (json.loads(score_file(cell, "test", key).read_text()) for key in ("M=20", "queries, M=20"))
    assert not jobs.failed and len(calls) == 2  # once a cell
    assert plain["metrics"] == each["metrics"] and plain["first hits"] == each["first hits"]
    for way, hits in plain["first hits"].items():
        assert each["queries"][f"{way} R@1"] == hits
    assert set(each["numbers"]) == {reproduce.START, reproduce.END} and each["numbers"][reproduce.START] > 0


def test_two_processes_never_work_at_one_cell(tmp_path):
    with claim(tmp_path / "cell", wait=False) as first:
        with claim(tmp_path / "cell", wait=False) as second:
            assert first and not second
    with claim(tmp_path / "cell", wait=False) as again:
        assert again


def test_bad_input_gives_one_sentence(config, tmp_path):
    with pytest.raises(ModelError, match="--seeds 0"):
        reproduce.reproduce(replace(config, seeds=0))
    with pytest.raises(ModelError, match="--split second is a set of built-in clips"):
        reproduce.reproduce(replace(config, split="second"))
    with pytest.raises(DataError, match=r"nowhere\.csv"):
        reproduce.reproduce(replace(config, annotations=tmp_path / "nowhere.csv"))


# ---------------------------------------------------------------------------------------------------- tables


@pytest.mark.slow
def test_all_tables_come_out_complete(config, monkeypatch):
    for name, table in TABLES.items():  # some rows of each, to save time
        some = (
            [row for row in table.rows if row.x in (0.4, 1.0)] if name == "radius-scale" else table.rows[:2]
        )
        monkeypatch.setitem(TABLES, name, replace(table, rows=tuple(some)))
    config = replace(config, table=tuple(TABLES), seeds=1, max_steps=1)
    jobs = reproduce.reproduce(config)
    assert not jobs.failed
    for name, table in TABLES.items():
        file = f"{name}-val" if table.choice else name  # choices are made on validation
        content = json.loads((reproduce.root(config) / f"{file}.json").read_text())
        assert content["split"] == ("val" if table.choice else "test")
        columns = [*table.columns, *((HONEST, LEAKS) if table.leaks else ())]
        assert list(content["rows"]) == [row.name for row in table.rows] and content["minutes"] > 0
        assert content["sizes"] == [[4 if name == "analysis" else 20, 4, 4]]
        for row in content["rows"].values():
            assert set(columns) <= set(row["values"])
            assert all(len(values) == 1 for values in row["values"].values())
        text = (reproduce.root(config) / f"{file}.md").read_text()
        first = next(part for part in text.split("\n\n") if "|---|" in part)
        assert "not run" not in text and len(first.splitlines()) == 2 + len(table.rows)
        assert (reproduce.root(config) / f"reproduce_{file}.png").stat().st_size > 5000
        assert ("LEAKS" in text) == (name == "recipes")  # the leak is in one table only, and is marked
    M = json.loads((reproduce.root(config) / "M.json").read_text())["rows"]
    assert {row["baseline"] for row in M.values()} == {None, "M = 0"}
    leaky = json.loads(score_file(cell_folder(config, XPOOL, 0), "test", "LEAKS").read_text())
    assert "panels" not in leaky
