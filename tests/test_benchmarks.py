"""The steps that the benchmarks compare do the same work, and every part of the one for a GPU runs."""

import importlib.util
import json
import operator
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, small_clip
from videos import container

from benchmarks import frames, gpu, inference, search, train_step
from benchmarks.own_process import rows_of
from engine.config import preset
from model import TMASS

spec = importlib.util.spec_from_file_location("train_step", ROOT / "benchmarks" / "train_step.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

BATCH, DIM, CPU = 5, 24, torch.device("cpu")


def a_step(name: str) -> tuple[TMASS, object, tuple[torch.Tensor, torch.Tensor]]:
    """A model, a function that takes a step with it, and a batch."""
    torch.manual_seed(1)
    model = TMASS(small_clip("vit"), num_frames=benchmark.FRAMES, dropout=0.0)
    same = dict(batch=BATCH, num_frames=benchmark.FRAMES, prior_std=0.0)
    config = replace(preset("msrvtt", "tmass"), **same, **benchmark.STEPS[name])
    torch.manual_seed(2)
    return model, benchmark.stepper(name, model, config, CPU)[0], benchmark.random_batch(model, BATCH, CPU)


def test_plain_step_is_the_same_step():
    plain, ours = a_step("plain"), a_step("train_step --micro-batch 8")
    loss, (same_loss, _) = (step(*batch) for _, step, batch in (plain, ours))
    assert abs(loss - same_loss.item()) < 1e-5 * loss
    for (name, a), (_, b) in zip(plain[0].named_parameters(), ours[0].named_parameters()):
        assert (a.grad - b.grad).norm() <= 1e-4 * a.grad.norm() + 1e-8, name


def test_the_timed_step_is_the_papers():
    for arch in ("tiny", "ViT-B/32"):
        assert benchmark.config_of(arch, BATCH).recipe == "paper"


def test_flops_of_a_step_are_those_counted_by_hand():
    """Two for each multiplication of a matrix product. The backward pass costs twice the forward pass, except
    that images need no gradient."""

    def block(tokens, width):  # 12 width^2 weights a token, and two products of attention
        return 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width

    frames = BATCH * benchmark.FRAMES
    patches = 4 * 2 * (3 * 16**2) * 64
    vision = 2 * block(5, 64) + 2 * 64 * DIM
    text = block(20, 64) + 2 * 64 * DIM
    psi = 2 * DIM**2 * (BATCH + 2 * frames + 2 * BATCH**2)  # W_q; W_k and W_v; W_o and P
    psi += 2 * 2 * BATCH * frames * DIM  # a, and the sum of values
    radius = 2 * BATCH * frames * DIM + 2 * BATCH * frames * DIM  # S, and S W
    _, step, batch = a_step("plain")
    trained = frames * vision + BATCH * text + psi + radius
    assert benchmark.count_flops(lambda: step(*batch)) == 2 * frames * patches + 3 * trained


# ------------------------------------------------------------------------------------------ the one for a GPU


@pytest.mark.slow
def test_every_part_of_the_gpu_benchmark_runs_on_the_cpu_at_toy_size(tmp_path, monkeypatch, capfd):
    """In this process, with compilation only noted and without starting pytest: about 3 seconds in all."""

    def here(function, *arguments, limit, log):
        assert 5 < limit <= 150 and log.parent.is_dir()
        return [*function(*arguments)], ""

    def pytest_of(command, **_):
        files = [name.split("::") for name in command if name.startswith("tests/")]
        assert len(files) == 2
        for file, *test in files:
            assert all(f"def {name}(" in (ROOT / file).read_text() for name in test)
        return types.SimpleNamespace(stdout="3 passed in 0.1s", returncode=0)

    compiled = []
    monkeypatch.setattr(gpu, "rows_of", here)
    monkeypatch.setattr(gpu.gc, "collect", lambda: 0)  # all that the tests imported, each time
    monkeypatch.setattr(gpu, "subprocess", types.SimpleNamespace(run=pytest_of, PIPE=-1, STDOUT=-2))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    with pytest.raises(SystemExit) as end:
        gpu.main(["--device", "cpu", "--toy", "--runs", str(tmp_path)])
    out = capfd.readouterr().out
    assert end.value.code == 0 and "Failed: nothing." in out and len(compiled) == 4
    (path,) = tmp_path.glob("*/gpu.json")
    found = json.loads(path.read_text())
    assert found["machine"]["torch"] == torch.__version__ and found["commit"] and found["device"] == "cpu"
    parts = {name: part["rows"] for name, part in found["parts"].items()}
    assert list(parts) == list(gpu.parts_of(gpu.TOY, tmp_path)) and all(parts.values())
    every = [*parts["steps, toy"], *parts["compiled steps, toy"]]
    assert len(every) == 7 and all(
        row["ratio"] > 0 and row["MFU, %"] > 0 and row["batch"] == 3 for row in every
    )
    assert [row["steps"] for row in parts["short training"][:3]] == [4, 2, 4]
    assert (
        parts["short training"][1]["exit code"] == 130
        and parts["short training"][2]["apart, of the way"] == 0
    )
    exact = [row for row in parts["device against CPU"] if "16" not in row["what"]]
    assert len(exact) == 12 and {row["difference"] for row in exact} == {0}
    assert all(name in out for name in parts) and parts["loader"][0]["of the fastest step"] > 0


def test_the_gpu_benchmark_is_of_both_vits_at_the_papers_batch():
    parts, sizes = gpu.parts_of(gpu.Sizes(), ROOT), gpu.Sizes()
    assert {"steps, ViT-B/32", "compiled steps, ViT-B/16"} <= parts.keys() and gpu.TOTAL < 600
    assert (sizes.batch, train_step.FRAMES) == (32, 12) and sizes.batch % sizes.micro[1] > 0
    assert sizes.pairs[-1] == (59_800, 2990) and sizes.videos == 10**6


def test_the_gpu_benchmark_goes_on_after_failures_until_its_time_is_over(tmp_path, monkeypatch, capfd):
    """The first part fails, a row of the second does too, and the third takes all the time."""
    now, asked = [0.0], []
    found = [([], "ValueError: broken"), ([{"step": "a", "failed": "x"}], ""), ([{"tests": "1"}], "stopped")]

    def rows_of(function, *_, limit, log):
        asked.append((function.__name__, limit))
        now[0] += 30 if len(asked) < 3 else 1000
        return found[len(asked) - 1]

    monkeypatch.setattr(gpu, "rows_of", rows_of)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    with pytest.raises(SystemExit) as end:
        gpu.main(["--device", "cpu", "--toy", "--runs", str(tmp_path)])
    out = capfd.readouterr().out
    assert end.value.code == 1 and asked == [("machine", 40), ("products", 40), ("tests", 100)]
    assert "failed: ValueError: broken" in out and out.count("not run, the 570 s of all parts are over") == 7
    assert (
        out.rstrip().splitlines()[-1].startswith("1060 s. Failed: machine, products, tests, device against")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_benchmark_without_a_gpu_is_one_sentence():
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert str(end.value.code).startswith("error: --device cuda: torch cannot compute there")


def test_a_batch_that_is_too_large_is_halved_until_it_fits(monkeypatch):
    tried = []

    def measure(arch, device, name, batch, timing):
        tried.append(batch)
        if batch > smallest:
            raise torch.OutOfMemoryError("out of memory")
        return {"batch": batch}

    monkeypatch.setattr(train_step, "measure", measure)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    smallest = 8
    assert train_step.case("tiny", "cpu", "plain")["batch"] == 8 and tried == [32, 16, 8]
    smallest = 0
    with pytest.raises(torch.OutOfMemoryError):
        train_step.case("tiny", "cpu", "plain")
    assert tried[3:] == [32, 16, 8, 4, 2, 1]


# ------------------------------------------------------------------------------------ search


def test_the_document_of_search_holds_the_tables_of_its_benchmark():
    content, document = json.loads(search.JSON.read_text()), (ROOT / "docs" / "search.md").read_text()
    assert [line for line in search.tables(content) if line not in document.splitlines()] == []
    assert {row["clips"] for row in content["rows"]} >= {10**3, 10**4, 10**5}
    assert content["index"].keys() == {"tiny", "ViT-B/32"}


def test_the_growth_of_queries_is_the_exponent_of_their_seconds():
    rows = [{"clips": 10**n, "query": 0.25 * (10**n) ** 0.75} for n in range(3, 7)]
    assert search.growth(rows) == pytest.approx(0.75)


# ----------------------------------------------------------------------------------------- the one for frames


def test_the_tables_of_the_document_are_those_of_the_committed_run():
    found = json.loads((ROOT / "benchmarks" / "frames.json").read_text())
    document = (ROOT / "docs" / "data.md").read_text()
    for table in frames.tables(found).split("\n\n"):
        assert f"\n\n{table}\n\n" in document


def test_each_way_to_read_frames_that_is_installed_gives_those_of_a_full_decode(tmp_path, monkeypatch):
    """In this process. A file that is no video is left out."""
    monkeypatch.setattr(frames, "in_own_process", lambda function, *arguments: (function(*arguments), 0))
    (tmp_path / "videos").mkdir()
    for name in ("b-frames.mp4", "long-gop.ts"):
        (tmp_path / "videos" / name).symlink_to(container(name))
    (tmp_path / "videos" / "no.mp4").write_text("no video")
    clips = frames.clips_of(tmp_path / "videos")
    count, rows = frames.compared(clips, tmp_path, rounds=1)
    there = {name for name, way in frames.WAYS.items() if not way.package or frames.version(way.package)}
    assert count == 2 and {row["way"] for row in rows} == there >= {frames.OURS}
    for row in rows:
        assert row["read"] == 2 and row["cpu"] > 0 and row["wall"] > 0
        if frames.WAYS[row["way"]].package == "":
            assert row["exact"] == (1.0 if frames.WAYS[row["way"]].compared else None)
    grown = frames.growth(clips[0], tmp_path, (1, 2))
    assert grown["frames"] == [200, 400] and all(len(row["cpu"]) == 2 for row in grown["rows"])
    table = frames.tables({"clips": count, "rows": rows, "odd": {"clips": 2, "rows": rows}, "growth": grown})
    assert f"| {frames.OURS} | " in table and table.count("not installed") == len(frames.WAYS) - len(there)


def test_a_frame_beside_the_right_one_is_not_exact_and_one_in_other_colours_is():
    whole = [torch.randint(250, (6, 8, 3), dtype=torch.uint8).numpy() for _ in range(30)]
    right = [whole[number] + 3 for number in frames.segment_midpoints(30, frames.FRAMES)]
    assert frames.exact(right, whole) == 12 and frames.exact([*right[1:], right[0]], whole) == 0
    assert frames.exact([frame[:, 1:] for frame in right], whole) == 0


# ------------------------------------------------------------------------------------ a process for each part


@pytest.mark.parametrize("function, arguments, rows, why", [
    (map, (abs, [-1, 2]), [1, 2], ""),
    (map, (operator.floordiv, [6, 1], [3, 0]), [2], "ZeroDivisionError: integer division or modulo by zero"),
    (map, (signal.raise_signal, [0, signal.SIGKILL]), [None], "the process ended with exit code -9"),
    (map, (sys.exit, [3]), [], "the process ended with exit code 3"),
])  # fmt: skip
def test_a_part_gives_its_rows_and_why_it_ended(function, arguments, rows, why, tmp_path):
    assert rows_of(function, *arguments, limit=30, log=tmp_path / "log") == (rows, why)
    assert ("Traceback" in (tmp_path / "log").read_text()) == why.startswith("Zero")


def test_a_part_that_takes_too_long_is_ended_with_the_processes_that_it_started(tmp_path):
    commands = [["sleep", "0"], ["sleep", "97.25"]]
    rows, why = rows_of(map, subprocess.call, commands, limit=2, log=tmp_path / "log")
    assert rows == [0] and why == "stopped after 2 s"
    time.sleep(0.5)  # until the kernel has removed it
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"97.25" in command for command in running)


# ---------------------------------------------------------------------------------------- scores and training


def test_documents_hold_the_tables_of_scores_and_of_training():
    content = {
        name: json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
        for name in ("inference", "train_step")
    }
    training = content["train_step"]
    tables = {"inference": [inference.markdown(content["inference"])], "training": [
        train_step.steps_table(training["rows"]), *map(train_step.stages_table, training["stages"]),
        train_step.heads_table(training["heads"]), train_step.contention_table(training["heads"]),
    ]}  # fmt: skip
    for name, found in tables.items():
        document = (ROOT / "docs" / f"{name}.md").read_text()
        assert [table for table in found if table not in document] == []
    rows = {
        row["form"]: row["seconds"]
        for row in content["inference"]["rows"]
        if row.get("texts") == row.get("videos") == 1000
    }
    words = " ".join((ROOT / "docs" / "inference.md").read_text().split())
    assert [x for x in content["inference"]["ratios"].values() if f"{x:.2f} times" not in words] == []
    shared, own = (inference.digits(rows[f"literal, blocked{draws}"]) for draws in ("", ", own draws"))
    readme = " ".join((ROOT / "README.md").read_text().split())
    sentence = f"1,000 × 1,000 pairs take {inference.digits(rows['fast'])} s; the literal form {shared} s"
    assert sentence in readme and f"{own} s with separate" in readme


def test_ratios_are_of_cases_that_take_turns():
    found = inference.turns_case(rounds=1, square=8, few=[(2, 9), (9, 2)])
    assert found.keys() == {"fast / bare products", "R joint / fast", "2 x 9 / square", "9 x 2 / square"}
    assert all(ratio > 0 for ratio in found.values())


def test_growth_is_the_exponent_of_the_largest_sizes():
    points = [(10**n, 3 * (10**n) ** 0.5) for n in range(2, 6)]
    assert inference.exponent(points) == pytest.approx(0.5) and inference.exponent(points[:1]) is None
