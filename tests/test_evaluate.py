"""The command evaluate.py: what it scores, prints and writes, for one and for several processes."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, randn, random_model
from processes import ranks

import evaluate
import model as model_module
import train
from engine.checkpoint import open_checkpoint, save_checkpoint
from engine.datasets import DATASETS, cache_folder, of_split, read_csv
from engine.distributed import gather, init_distributed, shard
from engine.features import extract_features, feature_cache
from engine.frames import FrameCache
from engine.scoring import noise_bank, scores
from engine.weights import load_file
from evaluate import scores_literal
from model import MeanPool

DIM = 24


def test_public_names_are_importable_from_here():
    names = (
        "scores noise_bank PairNoise Expectation best_of default_block retrieval_metrics text_to_video_ranks"
    )
    names += " dual_softmax table Features extract_features feature_cache fingerprint choose_device autocast"
    names += (
        " latest_run open_checkpoint EvaluationConfig contact_sheet rank_histogram scores_literal prior_of"
    )
    assert set(names.split()) <= set(evaluate.__all__)
    assert all(hasattr(evaluate, name) for name in evaluate.__all__)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def run(clips_folder, tmp_path, monkeypatch):
    """run(*flags): what evaluate.py writes to results.json for a random T-MASS and the small data set."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "runs" / "one" / "best.pt", random_model(frames=3))

    def newest() -> dict:
        files = (tmp_path / "runs" / "one").glob("results*.json")
        return json.loads(max(files, key=lambda path: path.stat().st_mtime_ns).read_text())

    flags = [*data_flags(clips_folder), "--device", "cpu", "--M", "3"]
    return lambda *more: evaluate.main([*flags, *more]) or newest()


def data_flags(clips_folder: Path) -> list[str]:
    """The flags of the small data set."""
    csv, videos = clips_folder / "clips.csv", clips_folder / "clips"
    return ["--dataset", "csv", "--annotations", str(csv), "--videos", str(videos)]


def test_fits_are_reported_where_relevance_is_known_and_absent_elsewhere(
    run, clips_folder, monkeypatch, capsys
):
    assert "fits@1" not in run()["metrics"]["t2v"] and "fits@1" not in capsys.readouterr().out
    known = replace(DATASETS["csv"], relevance=DATASETS["shapes"].relevance)  # the small data set's clips
    monkeypatch.setitem(DATASETS, "csv", known)
    found = run()["metrics"]
    clips = of_split(read_csv(clips_folder / "clips.csv", clips_folder / "clips"), "test")
    relevant = DATASETS["shapes"].relevance(clips)
    assert relevant.shape == (20, 4) and {"fits@1", "R-Precision", "mAP@R"} <= found["t2v"].keys()
    assert found["t2v"]["fits@1"] >= found["t2v"]["R@1"] and "fits@1" not in found["v2t"]
    assert "fits@1" in capsys.readouterr().out
    assert "fits@1" not in run("--captions", "joined")["metrics"]["t2v"]  # what fits them is not known


def test_a_run_from_another_tiny_clip_is_named(run, capsys, tmp_path):
    config = {"arch": "tiny", "weights": None, "dataset": "csv"}
    save_checkpoint(tmp_path / "runs" / "one" / "best.pt", random_model(frames=3), config=config)
    run()
    assert re.search(r"note: .*one.best\.pt was trained from another tiny CLIP", capsys.readouterr().err)


@pytest.mark.pictures
def test_the_latest_run_is_evaluated_and_reported_alike_each_time(run, capsys, tmp_path):
    result = run()
    assert (result["texts"], result["videos"], result["M"], result["split"]) == (20, 4, 3, "test")
    assert (result["method"], result["fusion"], result["radius"]) == ("tmass", "xpool", "linear")
    assert len(result["sha256"]) == 64
    printed = capsys.readouterr().out
    assert "| T-MASS, M = 3 |" in printed and "LEAKS" not in printed
    assert f"{result['metrics']['t2v']['MnR']:.1f}" in printed
    for picture in ("ranks.png", "retrieved.png"):
        assert (tmp_path / "runs" / "one" / picture).read_bytes().startswith(b"\x89PNG")
    assert run()["metrics"] == result["metrics"]


@pytest.mark.parametrize("parts, method, name", [
    (("mean", "none"), "clip", "mean pooling"), (("xpool", "none"), "xpool", "X-Pool"),
    (("xpool", "joint"), "tmass", "T-MASS, R joint, M = 3"),
    (("mean", "linear"), "tmass", "psi mean, R linear, M = 3"),
])  # fmt: skip
def test_results_name_psi_and_radius(run, tmp_path, capsys, parts, method, name):
    model = random_model(fusion=parts[0], radius=parts[1], frames=3)
    save_checkpoint(tmp_path / "runs" / "one" / "best.pt", model)
    result = run()
    assert (result["fusion"], result["radius"], result["method"], result["name"]) == (*parts, method, name)
    assert re.search(rf"(?m)^\| {name} +\|", capsys.readouterr().out)


def test_results_keep_their_keys(run):
    keys = (
        "name checkpoint sha256 method fusion radius dataset split texts videos missing M prior seed metrics"
    )
    assert list(run()) == [*keys.split(), "seconds", "machine", "config", "trained"]


def test_a_folder_that_cannot_be_written_is_said_and_the_metrics_are_printed(run, capsys, tmp_path):
    (tmp_path / "full").write_text("a file")
    sentence = (
        r"full/one could not be written \(Not a directory\): free some space there, or name another folder"
    )
    with pytest.raises(SystemExit, match=rf"^error: {sentence} by --out\.$"):
        run("--out", "full")
    printed = capsys.readouterr().out
    assert "| T-MASS, M = 3 |" in printed and "written:" not in printed


def test_a_run_without_validation_is_that_of_its_last_step_and_is_evaluated(
    run, clips_folder, weights, tmp_path
):
    flags = [*data_flags(clips_folder), "--arch", "tiny", "--weights", str(weights), "--device", "cpu"]
    flags += ["--num-frames", "3", "--batch", "8", "--epochs", "1", "--val", "none", "--out", "runs/none"]
    train.main([*flags, "--recipe", "released", "--max-steps", "1"])
    train.main([*flags, "--recipe", "released", "--max-steps", "1", "--resume"])
    best, last = (load_file(tmp_path / "runs" / "none" / name) for name in ("best.pt", "last.pt"))
    assert best["step"] == last["step"] == last["validated"] == 1 and best["val"] is None
    assert all(torch.equal(best["model"][name], value) for name, value in last["model"].items())
    assert {group["eps"] for group in last["optimizer"]["param_groups"]} == {1e-6}
    W = last["model"]["radius.linear.weight"]
    assert (W - torch.eye(*W.shape)).abs().max() < 0.01
    run("--checkpoint", "runs/none", "runs/one")
    assert (tmp_path / "runs" / "none" / "results.json").exists()
    with pytest.raises(SystemExit, match=r"no clip has split 'val': .* train\.py --val N"):
        run("--checkpoint", "runs/none", "--split", "val")


def test_val_of_a_run_is_what_it_was_validated_on(run, clips_folder, weights, tmp_path):
    flags = [*data_flags(clips_folder), "--arch", "tiny", "--weights", str(weights), "--device", "cpu"]
    flags += ["--num-frames", "3", "--batch", "8", "--max-steps", "1", "--val", "5", "--M", "3"]
    train.main([*flags, "--amp", "off", "--out", "runs/five"])
    run("--checkpoint", "runs/five", "runs/one", "--split", "val")
    found = json.loads((tmp_path / "runs" / "five" / "results.json").read_text())
    assert found["videos"] == 5
    assert found["metrics"] == load_file(tmp_path / "runs" / "five" / "best.pt")["val"]


@pytest.mark.parametrize("flag, value", [("--M", "-1"), ("--batch", "0"), ("--prior-std", "nan")])
def test_numbers_out_of_range_give_one_sentence(run, flag, value):
    with pytest.raises(SystemExit, match=f"^error: {flag} {value}: give a number from [01] (on|to .*).$"):
        run(flag, value)


def test_broken_checkpoint_is_named(run, tmp_path, capsys):
    model = random_model(frames=3)
    model.fusion.out.weight.data[0, 0] = torch.nan
    save_checkpoint(tmp_path / "runs" / "one" / "best.pt", model)
    sentence = r"^error: runs/one/best\.pt is damaged, or its training diverged: fusion.out.weight holds NaN"
    with pytest.raises(SystemExit, match=sentence):
        run()


def test_missing_videos_are_refused_and_a_smaller_gallery_is_named_beside_every_metric(
    run, clips_folder, tmp_path, capsys
):
    shutil.copytree(clips_folder / "clips", tmp_path / "videos")
    (tmp_path / "videos" / "clip00021.mp4").unlink()
    videos = ("--videos", str(tmp_path / "videos"))
    sentence = r"1 of 4 videos to evaluate on cannot be read.*clip00021\.mp4 not found.*--allow-missing"
    with pytest.raises(SystemExit, match=sentence):
        run(*videos)
    result = run(*videos, "--allow-missing")
    assert (result["videos"], result["missing"], result["texts"]) == (3, 1, 15)
    assert "| T-MASS, M = 3, 3 of 4 videos |" in capsys.readouterr().out
    for path in (tmp_path / "videos").iterdir():
        path.write_text("no video")
    with pytest.raises(SystemExit, match="none of the 4 videos"):
        run(*videos, "--allow-missing", "--data", str(tmp_path / "other"))


@pytest.mark.pictures
def test_kept_features_are_evaluated_without_frames(run, clips_folder, tmp_path, capsys):
    """On a machine that has the cached features alone: the same metrics, without the picture."""
    shutil.copytree(clips_folder / "clips", tmp_path / "videos")
    flags = ("--videos", str(tmp_path / "videos"))
    expected = run(*flags)
    cache = FrameCache(cache_folder("csv", Path("data"), tmp_path / "videos"), 3, 32)
    clips = of_split(read_csv(clips_folder / "clips.csv", tmp_path / "videos"), "test")
    model = open_checkpoint(Path("runs/one"))[0]
    extract_features(model, clips, cache, store=feature_cache(cache, model), keep="vision")
    for path in [*cache.folder.glob("*.zip"), *(tmp_path / "videos").iterdir()]:
        path.unlink()
    assert run(*flags)["metrics"] == expected["metrics"]
    assert "no retrieved.png: " in capsys.readouterr().err


@pytest.mark.parametrize("captions, texts", [("all", 20), ("first", 4), ("joined", 4)])
def test_captions_choose_the_queries(run, captions, texts):
    assert run("--captions", captions)["texts"] == texts


def test_no_draws_and_score_mean_are_the_same(run):
    assert run("--M", "0")["metrics"] == run("--score", "mean")["metrics"] != run()["metrics"]


def test_every_row_of_the_released_protocol_says_that_it_leaks_and_its_files_too(run, capsys, tmp_path):
    honest, folder = run(), tmp_path / "runs" / "one"
    capsys.readouterr()
    with pytest.raises(SystemExit, match="one caption a video"):
        run("--protocol", "released")
    both = ("--checkpoint", "runs/one", "runs/one/best.pt")
    run("--protocol", "released", "--captions", "first", *both)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| T-MASS")]
    assert len(rows) == 4 and all("LEAKS" in row for row in rows)
    assert json.loads((folder / "results.json").read_text()) == honest
    assert (folder / "results-LEAKS.json").exists()


def test_dual_softmax_is_called_transductive(run, capsys):
    without, alone = run()["metrics"], run("--dsl")
    assert alone["metrics"] != without and alone["config"]["dsl"] == "temperature"
    assert "| T-MASS, M = 3, DSL temperature (transductive) |" in capsys.readouterr().out
    assert run("--dsl", "released")["config"]["dsl"] == "released"
    assert "| T-MASS, M = 3, DSL released (transductive) |" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- a psi of one's own


class FirstFrame(MeanPool):
    """A toy psi: the first frame. engine/scoring.py has no fast form of it."""

    def forward(self, text, frames):
        """v = f_1."""
        return frames[:, 0].expand(len(text), -1, -1)


def test_a_psi_without_a_fast_form_is_scored_as_itself_and_a_note_says_so_once(
    run, clips_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(model_module.FUSIONS, "first", FirstFrame)
    for name in ("one", "two"):
        save_checkpoint(tmp_path / "runs" / name / "best.pt", random_model(fusion="first", frames=3))
    run("--checkpoint", "runs/two", "runs/one")
    printed = capsys.readouterr()
    notes = [line for line in printed.err.splitlines() if "FirstFrame" in line]
    assert len(notes) == 1 and re.match(r"note: FirstFrame has no fast form", notes[0])
    assert "evaluate.py" not in printed.err and "psi first, R linear, M = 3" in printed.out
    sources = dict(annotations=clips_folder / "clips.csv", videos=clips_folder / "clips")
    config = evaluate.EvaluationConfig(dataset="csv", device="cpu", M=3, **sources)
    opened = evaluate.open_run(config, Path("runs/one"))
    found = opened.features
    literal = scores_literal(opened.model, found.text, found.frames, noise_bank(3, DIM, 0))
    result = json.loads((tmp_path / "runs" / "one" / "results.json").read_text())
    assert evaluate.retrieval_metrics(literal, found.owner) == result["metrics"]


# --------------------------------------------------------------------------------------------------- torchrun


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(run, clips_folder, tmp_path, noise="independent"):
    one = run("--noise", noise)["metrics"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = ["--M=3", "--noise", noise, *data_flags(clips_folder), "--device", "cpu"]
    command = [*torchrun, str(ROOT / "evaluate.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.count("| T-MASS, M = 3") == 2  # rank 0 alone prints; two directions
    assert json.loads((tmp_path / "runs" / "one" / "results.json").read_text())["metrics"] == one


TEXTS, VIDEOS, FRAMES = 7, 5, 4
text, frames = 3 * randn(TEXTS, DIM), 5 * randn(VIDEOS, FRAMES, DIM, seed=1)


def _score_a_shard(whole: torch.Tensor) -> None:
    init_distributed("cpu")
    part = scores(random_model(frames=FRAMES), text, frames[shard(VIDEOS)], noise_bank(6, DIM, 0))
    assert (gather(part.T.contiguous()).T - whole).abs().max() < 1e-6


@pytest.mark.slow
def test_columns_scored_by_three_processes_are_gathered_in_order(tmp_path):
    """Five videos over three processes: unequal shards."""
    whole = scores(random_model(frames=FRAMES), text, frames, noise_bank(6, DIM, 0))
    ranks(3, _score_a_shard, whole, folder=tmp_path)
