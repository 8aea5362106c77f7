"""The files of a run, how it is stopped, and how it is resumed."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from conftest import ROOT
from test_train import csv_config, of_method, same_weights

import train
from engine.checkpoint import open_checkpoint
from engine.config import RECIPES, Config
from engine.experiment import Claim, Interrupt, Log, finished, git_commit, open_run, read_log, run_folder
from engine.files import ModelError
from engine.weights import load_file


@pytest.fixture
def config(clips_folder, weights, tmp_path) -> Config:
    return csv_config(clips_folder, weights, tmp_path)


def same_rows(a: Path, b: Path) -> bool:
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in read_log(out)] for out in (a, b)]
    return rows[0] == rows[1]


def signal_in_step(number: int, monkeypatch) -> list:
    """Sends SIGTERM in the middle of the given step from now. Returns a list with an entry per step."""
    calls, loss = [], train.tmass_loss

    def with_a_signal(*arguments, **symbols):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments, **symbols)

    monkeypatch.setattr(train, "tmass_loss", with_a_signal)
    return calls


# ------------------------------------------------------------------------------------------ folder and log


def test_a_run_is_named_by_data_set_arch_and_method(weights):
    assert run_folder(Config(dataset="msrvtt")) == Path("runs/msrvtt-vit-b32-tmass")
    other = Config(dataset="csv", arch="ViT-L/14@336px", method="xpool")
    assert run_folder(other) == Path("runs/csv-vit-l14336px-xpool")
    assert run_folder(Config(arch=str(weights))) == Path("runs/shapes-small-tmass")


def test_a_finished_run_is_left_as_it_is_and_a_new_one_takes_a_new_folder(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    one, two = (train.train(replace(config, out=None, max_steps=1)) for _ in range(2))
    assert (str(one), str(two)) == ("runs/csv-tiny-tmass", "runs/csv-tiny-tmass-2")
    before = (one / "metrics.jsonl").read_text()
    train.train(replace(config, out=one, max_steps=1, resume=True))
    assert (one / "metrics.jsonl").read_text() == before


def test_a_folder_that_cannot_be_written_is_said_before_training(config, weights):
    with pytest.raises(ModelError, match=rf"{weights}/run could not be written \(Not a directory\)"):
        train.train(replace(config, out=weights / "run"))


def test_checkpoint_says_what_made_it(config):
    out = train.train(replace(config, max_steps=1))
    content = load_file(out / "best.pt")
    assert content["config"]["batch"] == 8 and content["config"]["videos"] == str(config.videos)
    assert (
        content["step"] == 1
        and len(content["data"]) == 64
        and content["commit"]
        and "R@1" in content["val"]["t2v"]
    )
    model, trained, _ = open_checkpoint(out)
    assert model.arguments["num_frames"] == 3 and trained["dataset"] == "csv"


def test_clips_that_cannot_be_read_are_skipped_counted_and_listed(config, clips_folder, tmp_path, capsys):
    videos = tmp_path / "videos"
    shutil.copytree(clips_folder / "clips", videos)
    (videos / "clip00003.mp4").unlink()
    (videos / "clip00016.mp4").write_text("<html>")
    out = train.train(replace(config, max_steps=1, videos=videos))
    record = json.loads((out / "data.json").read_text())
    assert list(record["skipped"]) == ["clip00003.mp4", "clip00016.mp4"] and record["train"] == 15
    assert record["val"] == ["clip00017.mp4", "clip00018.mp4", "clip00019.mp4"]
    assert f"2 clips cannot be read and are skipped, listed in {out}/data.json" in capsys.readouterr().out
    with pytest.raises(
        ModelError, match="other clips or captions"
    ):  # with one more, it is another training set
        shutil.copy(clips_folder / "clips" / "clip00003.mp4", videos)
        train.train(replace(config, max_steps=1, videos=videos, resume=True))


def test_a_resumed_log_drops_the_rows_that_are_repeated(tmp_path):
    log = Log(tmp_path)
    for step in (10, 20, 30):
        log.row(step=step, loss=1.0)
        log.row(step=step, val={})
    Log(tmp_path, step=20, validated=10).row(step=30, done=True)
    rows = [(row["step"], *(row.keys() - {"step", "seconds"})) for row in read_log(tmp_path)]
    assert rows == [(10, "loss"), (10, "val"), (20, "loss"), (30, "done")] and finished(tmp_path)
    Log(tmp_path)  # a new run
    assert read_log(tmp_path) == [] and not finished(tmp_path) and not finished(tmp_path / "none")


def test_an_incomplete_row_is_left_out(tmp_path):
    Log(tmp_path).row(step=1, loss=2.0)
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 2, "lo')
    assert [row["step"] for row in read_log(tmp_path)] == [1]


@pytest.mark.parametrize(
    "line", [b"3", b"[]", b"null", b'{"loss": 2}', b'{"step": "x"}', b"\xff\x00\x00", b"[" * 10**5]
)
def test_a_line_that_is_no_row_is_left_out(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2] and not finished(tmp_path)


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_that_is_not_utf8_shows_escapes(encoding):
    r"""Every command imports engine, which sets this in one place. \udcff is a byte of a name."""
    code = "import engine; print('café 视频 \\udcff')"
    command = [sys.executable, "-S", "-c", code]
    shown = subprocess.run(command, cwd=ROOT, env={"PYTHONIOENCODING": encoding}, capture_output=True)
    video = "视频" if encoding == "utf-8" else r"\u89c6\u9891"
    cafe = r"caf\xe9" if encoding.startswith("ascii") else "café"
    expected = rf"{cafe} {video} \udcff" + "\n"
    assert (shown.stdout.decode(encoding.partition(":")[0]), shown.stderr) == (expected, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_row_on_a_full_disk_gives_one_sentence(tmp_path):
    log = Log(tmp_path)
    log.path = Path("/dev/full")
    says = r"/dev/full could not be written \(No space left on device\): free some space and continue with"
    with pytest.raises(ModelError, match=says):
        log.row(step=1)


def test_a_run_is_never_overwritten(config, tmp_path):
    Log(open_run(config)[0]).row(step=1)
    with pytest.raises(ModelError, match="holds a run: add --resume to continue it"):
        open_run(config)
    assert open_run(replace(config, resume=True))[0] == config.out


@pytest.fixture
def other_process():
    """A function that starts a process which trains in a folder, with a worker; it kills both in the end."""
    groups = []

    def start(folder: Path) -> int:
        folder.mkdir(parents=True)
        read, write = os.pipe()
        if (process := os.fork()) == 0:
            os.setsid()
            claim = Claim.of(folder)
            if os.fork() == 0:  # as DataLoader does
                time.sleep(60)
            os.write(write, b"claimed" if claim else b"")
            time.sleep(60)
        groups.append(process)
        assert os.read(read, 7) == b"claimed"
        return process

    yield start
    for group in groups:
        os.killpg(group, signal.SIGKILL)


def test_two_processes_never_write_to_one_run(config, other_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = other_process(Path("runs/csv-tiny-tmass"))
    assert open_run(replace(config, out=None))[0] == Path("runs/csv-tiny-tmass-2")
    for taken in (replace(config, out=Path("runs/csv-tiny-tmass")), replace(config, out=None, resume=True)):
        says = (
            "another process is training in runs/csv-tiny-tmass: wait for its end, or name another folder by"
        )
        with pytest.raises(ModelError, match=says):
            open_run(taken)
    os.kill(process, signal.SIGKILL)  # its worker lives on, and does not hold the folder
    os.waitpid(process, 0)
    assert open_run(replace(config, out=None, resume=True))[0] == Path("runs/csv-tiny-tmass")


def test_a_folder_is_free_again_when_its_run_is_gone(config, tmp_path):
    one, two = open_run(config), open_run(replace(config, resume=True))
    assert one[1] is two[1]  # one process may open a run again
    folder = one[0].resolve()
    del one, two
    assert folder not in Claim.held


def test_leftovers_of_killed_processes_are_removed(config):
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True)
    config.out.mkdir(parents=True)
    names = [f"last.pt.{socket.gethostname()}.{pid}.part" for pid in (int(process.stdout), os.getpid())]
    for name in [*names, "last.pt"]:
        (config.out / name).write_bytes(b"half")
    open_run(config)
    assert sorted(path.name for path in config.out.iterdir()) == sorted([names[1], "last.pt"])


@pytest.mark.parametrize("number", Interrupt.SIGNALS)
def test_the_first_signal_asks_and_the_second_kills(number):
    before = {name: signal.signal(name, signal.default_int_handler) for name in Interrupt.SIGNALS}
    try:
        with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
            assert not interrupt.asked
            os.kill(os.getpid(), number)
            assert interrupt.asked and interrupt.on_any_rank(torch.device("cpu"), ask_others=False)
            os.kill(os.getpid(), number)
        assert {signal.getsignal(name) for name in Interrupt.SIGNALS} == {signal.default_int_handler}
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def test_the_commit_is_recorded(monkeypatch):
    assert git_commit()
    monkeypatch.setenv("PATH", "")
    assert git_commit() == "unknown"


# --------------------------------------------------------------------------------------------------- resume


@pytest.mark.slow
@pytest.mark.parametrize("options, at", [
    (dict(freeze="vision", augment=False), 13), (dict(amp="fp16", micro_batch=3), 13), (RECIPES["best"], 13),
    (dict(), 10),
], ids=["fixed features", "fp16 in micro-batches", "best", "at an epoch's end"])  # fmt: skip
def test_a_run_stopped_by_a_signal_and_resumed_equals_one_never_stopped(
    config, tmp_path, monkeypatch, options, at
):
    config = replace(config, epochs=2, max_steps=17, **options)  # 10 steps an epoch
    whole = train.train(replace(config, out=tmp_path / "whole"))
    calls = signal_in_step(at, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match=rf"stopped after step {at} of 17: continue with .* --resume"):
        train.train(config)
    assert load_file(config.out / "last.pt")["step"] == at
    out = train.train(replace(config, resume=True))
    assert len(calls) == 17  # no step twice
    assert all(same_weights(whole / name, out / name) for name in ("last.pt", "best.pt"))
    assert same_rows(whole, out)


KILLS = int(os.environ.get("TMASS_KILLS", 2))  # TMASS_KILLS=10 pytest -s -k killed: ten, with their steps


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_weights_of_one_never_stopped(config, tmp_path):
    """kill -9 at a random moment: in a step, a validation, or the writing of a checkpoint, or before them."""
    config = replace(config, epochs=1 + KILLS, max_steps=9 + 6 * KILLS, save_every=1)  # 10 steps an epoch
    whole = train.train(replace(config, out=tmp_path / "whole", save_every=0))
    rng = random.Random()

    def start():
        return processes.start(train.train, replace(config, resume=True))

    last = config.out / "last.pt"

    def written() -> int | None:
        return last.stat().st_mtime_ns if last.exists() else None

    kills = []
    while len(kills) < KILLS:
        process, seen, newest = start(), 0, written()
        steps = rng.randint(not kills, 4)  # kill after so many new checkpoints; 0: at any time before them
        end = time.monotonic() + (rng.random() if steps == 0 else 60)
        while process.is_alive() and seen < max(1, steps) and time.monotonic() < end:
            now = written()
            seen, newest = seen + (now != newest), now
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05 * (steps > 0))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before its last kill"
        kills.append(load_file(last)["step"] if last.exists() else 0)  # complete
    end = start()
    end.join()
    print("killed after steps", kills)
    assert end.exitcode == 0 and max(kills) > 0
    assert all(same_weights(whole / name, config.out / name) for name in ("last.pt", "best.pt"))
    assert same_rows(whole, config.out)


def test_a_run_killed_in_its_validation_loses_no_step(config, tmp_path, monkeypatch):
    config = replace(config, max_steps=3)
    whole = train.train(replace(config, out=tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        twice = [signal.SIGINT] * 2  # the second Ctrl-C kills
        patch.setattr(train, "validate", lambda *_: [os.kill(os.getpid(), number) for number in twice])
        train.train(config)
    calls = signal_in_step(0, monkeypatch)
    train.train(replace(config, resume=True))
    assert calls == [] and same_weights(whole / "last.pt", config.out / "last.pt")
    assert same_rows(whole, config.out)
    assert load_file(config.out / "last.pt")["val"] == load_file(whole / "best.pt")["val"]


@pytest.mark.parametrize("method, radius", [("tmass", "linear"), ("xpool", "linear"), ("clip", "joint")])
def test_a_run_of_an_earlier_version_is_resumed(config, tmp_path, monkeypatch, method, radius):
    """Its records have no "fusion", and a radius that only the method "tmass" used."""
    config = of_method(config, method, max_steps=4)
    whole = train.train(replace(config, out=tmp_path / "whole"))
    signal_in_step(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    state = load_file(config.out / "last.pt")
    del state["config"]["fusion"], state["arguments"]["fusion"]
    state["config"]["radius"] = state["arguments"]["radius"] = radius
    state["arguments"]["method"] = method
    torch.save(state, config.out / "last.pt")
    out = train.train(replace(config, resume=True))
    assert same_weights(whole / "last.pt", out / "last.pt") and same_rows(whole, out)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_full_disk_ends_a_run_with_one_sentence_and_loses_nothing_older(config, tmp_path, monkeypatch):
    config = replace(config, max_steps=3)
    whole = train.train(replace(config, out=tmp_path / "whole"))
    signal_in_step(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    before = (config.out / "last.pt").read_bytes()
    part = config.out / f"last.pt.{socket.gethostname()}.{os.getpid()}.part"
    part.symlink_to("/dev/full")  # each write to it fails as on a full disk
    with pytest.raises(ModelError, match=r"last\.pt could not be written \(No space left on device\)"):
        train.train(replace(config, resume=True))
    assert (config.out / "last.pt").read_bytes() == before
    with (config.out / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "lo')  # a row without space
    out = train.train(replace(config, resume=True))
    assert same_weights(whole / "last.pt", out / "last.pt") and same_rows(whole, out)


def test_resume_refuses_another_config_other_data_and_a_foreign_file(config, clips_folder, tmp_path):
    train.train(replace(config, max_steps=1))
    with pytest.raises(ModelError, match="holds a run: add --resume"):
        train.train(replace(config, max_steps=1))
    with pytest.raises(ModelError, match=r"another config \(alpha 1.2 -> 0.5\)"):
        train.train(replace(config, max_steps=1, resume=True, alpha=0.5))
    with pytest.raises(ModelError, match=r"another config \(--recipe paper, not best\)"):
        train.train(replace(config, max_steps=1, resume=True, recipe="best", **RECIPES["best"]))
    less = tmp_path / "less.csv"
    less.write_text((clips_folder / "clips.csv").read_text().replace(" ", "  "))
    with pytest.raises(ModelError, match="other clips or captions"):
        train.train(replace(config, max_steps=1, resume=True, annotations=less))
    state = load_file(config.out / "last.pt")
    state["model"]["fusion.query.weight"] = state["model"]["fusion.query.weight"][:3]
    torch.save(state, config.out / "last.pt")
    with pytest.raises(ModelError, match=r"last\.pt does not fit this model"):
        train.train(replace(config, max_steps=1, resume=True))
    shutil.copy(config.out / "best.pt", config.out / "last.pt")
    with pytest.raises(ModelError, match=r"not a last\.pt"):
        train.train(replace(config, max_steps=1, resume=True))
    new = tmp_path / "new"  # nothing to resume: it starts
    assert train.train(replace(config, max_steps=1, out=new, resume=True)) == new
