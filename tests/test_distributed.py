"""Training by several processes, through the real command line: two gloo ranks on the CPU do what one process does."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, small_clip

import train
from model import load_file
from train import read_log


@pytest.fixture
def flags(clips_folder, tmp_path) -> list[str]:
    """Seven pairs a batch: the two processes have three and four of them (by micro-batches of three: in one, and in two). Four validation clips."""
    torch.save(small_clip("vit").state_dict(), tmp_path / "vit.pt")
    values = {"--dataset": "csv", "--annotations": clips_folder / "clips.csv", "--videos": clips_folder / "clips", "--data": tmp_path / "data",
              "--arch": "tiny", "--weights": tmp_path / "vit.pt", "--num-frames": 3, "--batch": 7, "--clip-lr": 3e-5, "--head-lr": 3e-5,
              "--max-steps": 3, "--device": "cpu"}  # fmt: skip
    return [str(x) for pair in values.items() for x in pair]


def torchrun(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "train.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_two_processes_give_loss_gradients_and_weights_of_one(flags, tmp_path):
    train.main([*flags, "--out", str(tmp_path / "one")])
    done = torchrun(*flags, "--micro-batch", "3", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation:") == 1  # the first process alone writes
    one, two = (load_file(tmp_path / name / "last.pt") for name in ("one", "two"))
    start, moved = load_file(tmp_path / "vit.pt"), 0.0
    for name, value in one["model"].items():
        assert torch.allclose(two["model"][name], value, rtol=0, atol=1e-5), name
        moved = max(moved, (value - start.get(name.removeprefix("clip."), value)).abs().max().item())
    assert moved > 4e-5  # weights move by much more than they differ
    # AdamW hardly sees how large a gradient is: compare the gradients themselves, in its running mean
    means = [torch.cat([entry["exp_avg"].flatten() for entry in state["optimizer"]["state"].values()]) for state in (one, two)]
    assert (means[0] - means[1]).norm() < 1e-5 * means[0].norm()
    rows = [read_log(tmp_path / name) for name in ("one", "two")]
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    assert rows[1][0]["loss"] == pytest.approx(rows[0][0]["loss"], rel=1e-5) and rows[1][1]["val"] == rows[0][1]["val"]


def test_more_processes_than_pairs_are_refused(flags, monkeypatch):
    monkeypatch.setattr(train, "rank_and_world", lambda: (0, 5))
    with pytest.raises(SystemExit, match="5 processes are more than the pairs of a batch or the validation clips: start fewer"):
        train.main(flags)


def test_shares_of_all_processes_are_the_whole(monkeypatch):
    import evaluate

    for world in (1, 2, 3, 5):
        shares = []
        for rank in range(world):
            monkeypatch.setattr(evaluate, "rank_and_world", lambda rank=rank, world=world: (rank, world))
            shares.append(list(range(7))[evaluate.share(7)])
        assert [thing for part in shares for thing in part] == list(range(7)) and all(shares)
