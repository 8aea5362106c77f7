import json
import math
import statistics
from dataclasses import replace

import pytest
import torch
from conftest import randn

import reproduce
from data import DataError
from model import ModelError
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
    paired_difference,
    score_file,
    student_t,
)
from train import Config, preset

ONE = Table("one run", (Row("X-Pool", {"method": "xpool"}), Row("T-MASS, t", {"method": "tmass"}, "M=0"), Row("T-MASS", {"method": "tmass"})))


@pytest.fixture
def config(clips_folder, weights, tmp_path) -> ReproduceConfig:
    """Two steps a run, on the 24 clips of the tests."""
    return ReproduceConfig(table=("recipes",), seeds=2, dataset="csv", arch="tiny", weights=weights, annotations=clips_folder / "clips.csv",
                           videos=clips_folder / "clips", data=tmp_path / "data", freeze="clip", batch=8, max_steps=2, out=tmp_path / "out",
                           device="cpu")  # fmt: skip


@pytest.fixture
def one(monkeypatch):
    """A single table of two runs a seed, one of them scored in two ways."""
    monkeypatch.setattr(reproduce, "TABLES", {"recipes": ONE})


# ---------------------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_students_t_is_that_of_the_printed_tables(freedom, t):
    assert student_t(freedom) == pytest.approx(t, abs=6e-4)


def test_paired_difference_is_that_of_a_hand_computation():
    """Differences 1, 2, 6: mean 3, std sqrt(7), t_2 = 4.303."""
    found = paired_difference({0: 11.0, 1: 12.0, 4: 16.0, 5: 99.0}, {4: 10.0, 0: 10.0, 1: 10.0, 7: -99.0})
    assert found["mean"] == 3 and found["seeds"] == 3 and found["half"] == pytest.approx(4.303 * math.sqrt(7) / math.sqrt(3), rel=1e-3)
    assert paired_difference({0: 5.0}, {0: 7.0}) == {"mean": -2, "half": None, "seeds": 1}
    assert paired_difference({0: 5.0}, {1: 7.0}) is None


def test_paired_difference_does_not_see_what_seeds_share():
    luck = dict(enumerate([0.0, 7.0, -3.0, 4.0]))
    assert paired_difference({seed: x + 1 for seed, x in luck.items()}, luck) == {"mean": 1, "half": 0, "seeds": 4}


def test_panels_equal_their_loops():
    n, size, scale = 7, 3, 5.0
    scores = torch.tanh(randn(n, n))
    found = further_analysis(scores, scale, size)
    irrelevant = [scores[i, j].item() for i in range(n) for j in range(n) if i != j]
    losses = []
    for i in range(6):  # two whole batches of three; the seventh pair is left over
        batch = range(i // size * size, i // size * size + size)
        rows, columns = ([scale * s.item() for s in line] for line in (scores[i, list(batch)], scores[list(batch), i]))
        losses.append(sum(math.log(sum(map(math.exp, line))) - scale * scores[i, i].item() for line in (rows, columns)) / 2)
    assert found[PAIRS[0]]["mean"] == pytest.approx(statistics.mean(irrelevant), abs=1e-5)
    assert found[PAIRS[1]]["mean"] == pytest.approx(scores.diag().mean().item(), abs=1e-5)
    assert found[PAIRS[2]]["mean"] == pytest.approx(statistics.mean(losses), abs=1e-5)
    assert all(sum(panel["share"]) == pytest.approx(100) for panel in found.values())  # every value is in one bin


# --------------------------------------------------------------------------------------------------------------------------- cells


def test_rows_differ_in_what_they_say_and_in_nothing_else(config):
    """X-Pool and every T-MASS run have the same epochs, rates and batch; folders are the same for the same flags alone."""
    rows = [row for table in TABLES.values() for row in table.rows]
    base = vars(cell_config(config, {"method": "xpool"}, 1))
    for row in rows:
        cell = vars(cell_config(config, row.flags, 1))
        own = {"method", "recipe", "out", *row.flags, *(reproduce.RECIPES["best"] if row.flags.get("recipe") == "best" else ())}
        assert {name: cell[name] for name in cell if name not in own} == {name: base[name] for name in base if name not in own}
        assert all(cell[name] == value for name, value in row.flags.items()) and row.score in SCORES
    cells = [cell_config(config, row.flags, 0) for row in rows]
    assert all((a == b) == (replace(a, out=None) == replace(b, out=None)) for a in cells for b in cells)  # what trains alike runs once


def test_built_in_clips_train_heads_only_and_others_as_their_preset():
    assert cell_config(ReproduceConfig(), {"method": "xpool"}, 0).freeze == "clip"
    real = cell_config(ReproduceConfig(dataset="msrvtt", arch="ViT-B/32"), {"method": "tmass"}, 0)
    assert real == replace(preset("msrvtt", "tmass", "paper"), arch="ViT-B/32", out=real.out, resume=True) and real.freeze == "none"


def test_recipe_is_a_preset_of_tmass_alone_and_its_paper_form_is_the_papers():
    assert preset("csv", "tmass", "paper") == replace(Config(), dataset="csv")
    assert preset("csv", "xpool", "best") == replace(Config(), dataset="csv", recipe="best", method="xpool")
    assert preset("csv", "tmass", "best") == replace(Config(), dataset="csv", recipe="best", **reproduce.RECIPES["best"])


def test_the_best_recipe_is_the_default_of_the_built_in_clips_alone():
    assert preset("shapes", "tmass") == preset("shapes", "tmass", "best") != preset("shapes", "tmass", "paper")
    assert preset("msrvtt", "tmass") == preset("msrvtt", "tmass", "paper") and preset("shapes", "xpool").recipe == "paper"


def numbers(config: ReproduceConfig) -> dict:
    """Everything that cells have been scored with: {cell and way to score it: metrics}."""
    root = reproduce.root(config)
    return {str(path.relative_to(root)): json.loads(path.read_text())["metrics"] for path in sorted(root.glob("*/seed*/scores/*.json"))}


def test_finished_cells_are_not_run_again_and_a_stopped_one_goes_on(config, monkeypatch, one, capsys):
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
    assert ran == ["xpool 0", "tmass 0", "xpool 1", "xpool 1", "tmass 1"]  # seed by seed; the stopped one again
    before = numbers(config)
    monkeypatch.setattr(reproduce, "open_run", None)  # nothing is opened or scored
    reproduce.reproduce(config)
    assert len(ran) == 5 and numbers(config) == before and len(before) == 2 * 3
    assert "4 cells, 4 of them finished" in capsys.readouterr().out


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


def test_a_finished_cell_of_another_config_is_named_and_not_served(config, one):
    reproduce.reproduce(replace(config, seeds=1))
    jobs = reproduce.reproduce(replace(config, seeds=1, max_steps=1))
    assert len(jobs.failed) == 2 and all("was made with another config (max_steps 2 -> 1)" in sentence for sentence in jobs.failed.values())
    assert "not run" in (reproduce.root(config) / "recipes.md").read_text()


def test_a_cell_that_fails_is_named_in_one_sentence_and_the_others_go_on(config, monkeypatch, one, capsys):
    train = reproduce.train.train

    def broken(cell):
        if cell.method == "tmass" and cell.seed == 0:
            raise RuntimeError("out of memory\nsecond line")
        return train(cell)

    monkeypatch.setattr(reproduce.train, "train", broken)
    flags = {"table": "recipes", **{name: getattr(config, name) for name in ("seeds", "dataset", "arch", "weights", "annotations", "videos", "data",
             "freeze", "batch", "max_steps", "out", "device")}}  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main([part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))])
    assert str(ended.value) == f"error: 1 of 4 cells failed, the first: {cell_folder(config, {'method': 'tmass'}, 0)}: RuntimeError: out of memory"
    seeds = [line.split("|")[-2].strip() for line in capsys.readouterr().out.splitlines() if line.startswith(("| X-Pool", "| T-MASS"))]
    assert seeds == ["2", "1", "1"]


def test_two_processes_never_work_at_one_cell(tmp_path):
    with claim(tmp_path / "cell", wait=False) as first:
        with claim(tmp_path / "cell", wait=False) as second:
            assert first and not second
    with claim(tmp_path / "cell", wait=False) as again:
        assert again


def test_bad_input_gives_one_sentence(config, tmp_path):
    with pytest.raises(ModelError, match="--seeds 0"):
        reproduce.reproduce(replace(config, seeds=0))
    with pytest.raises(DataError, match=r"nowhere\.csv"):
        reproduce.reproduce(replace(config, annotations=tmp_path / "nowhere.csv"))


# -------------------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.slow
def test_all_tables_come_out_complete(config):
    config = replace(config, table=tuple(TABLES), seeds=1, max_steps=1)
    jobs = reproduce.reproduce(config)
    assert not jobs.failed
    for name, table in TABLES.items():
        content = json.loads((reproduce.root(config) / f"{name}.json").read_text())
        columns = [*table.columns, *((HONEST, LEAKS) if table.leaks else ())]
        assert list(content["rows"]) == [row.name for row in table.rows] and content["minutes"] > 0
        assert content["sizes"] == [[4 if name == "analysis" else 20, 4, 4]]
        assert all(
            set(columns) <= set(row["values"]) and all(len(values) == 1 for values in row["values"].values()) for row in content["rows"].values()
        )
        text = (reproduce.root(config) / f"{name}.md").read_text()
        assert "not run" not in text and sum(line.startswith("| ") for line in text.splitlines()) == 1 + len(table.rows)
        assert (reproduce.root(config) / f"reproduce_{name}.png").stat().st_size > 5000
        assert ("LEAKS" in text) == (name == "recipes")  # the leak is in no other table, and says its name
    M = json.loads((reproduce.root(config) / "M.json").read_text())["rows"]
    assert {row["baseline"] for row in M.values()} == {None, "M = 0"}
    leaky = json.loads(score_file(cell_folder(config, {"method": "xpool"}, 0), "test", "LEAKS").read_text())
    assert "panels" not in leaky
