import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, small_clip

import train
from data import DataError
from evaluate import open_checkpoint
from model import ModelError, load_file
from train import PRESETS, Config, learning_rate, parse, preset, read_log


@pytest.fixture
def config(clips_folder, weights, tmp_path) -> Config:
    """Four steps an epoch, on 16 training clips, of a model with 24 channels."""
    return Config(dataset="csv", annotations=clips_folder / "clips.csv", videos=clips_folder / "clips", data=tmp_path / "data", out=tmp_path / "run",
                  arch="tiny", weights=weights, num_frames=3, batch=8, epochs=1, clip_lr=1e-3, head_lr=1e-3, M=4, device="cpu")  # fmt: skip


def same_weights(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(load_file(a)["model"].values(), load_file(b)["model"].values(), strict=True))


# ------------------------------------------------------------------------------------------------------------------------ config


def test_a_flag_wins_over_a_preset_and_a_preset_over_the_defaults():
    assert parse([]).arch == "tiny" and parse(["--arch", "ViT-B/16"]).arch == "ViT-B/16"
    assert parse(["--dataset", "lsmdc"]).head_lr == PRESETS["lsmdc"]["head_lr"] != Config().head_lr
    assert parse(["--dataset", "lsmdc", "--head-lr", "0.1", "--no-amp"]) == replace(preset("lsmdc", "tmass"), head_lr=0.1, amp=False)
    assert parse(["--dataset=msrvtt", "--method=xpool"]) == preset("msrvtt", "xpool")


def test_defaults_are_the_papers():
    c = Config()
    numbers = (c.batch, c.clip_lr, c.weight_decay, c.dropout, c.num_frames, c.epochs, c.warmup, c.grad_clip, c.alpha, c.M, c.prior_std, c.radius)
    assert numbers == (32, 1e-6, 0.2, 0.3, 12, 5, 0.1, 1.0, 1.2, 20, 1.0, "linear")


def test_learning_rate_rises_to_one_and_falls_to_zero():
    rates = [learning_rate(step, 100, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)]) and max(rates) == 1
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[55] == pytest.approx(0.5, abs=0.01) and rates[100] == pytest.approx(0)


# ---------------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("options", [
    dict(), dict(pairs="every", prior="uniform"), dict(method="xpool", heads=2), dict(method="clip"), dict(freeze="vision", augment=False),
])  # fmt: skip
def test_training_changes_what_should_learn_and_nothing_else(config, options):
    config = replace(config, max_steps=2, **options)
    torch.manual_seed(config.seed)
    start = {name: value.clone() for name, value in train.build(config).state_dict().items()}
    out = train.train(config)
    end = load_file(out / "last.pt")["model"]
    moved = {name for name in end if not torch.equal(start[name], end[name])}
    vision, heads = {n for n in end if n.startswith("clip.visual.")}, {n for n in end if not n.startswith("clip.")}
    statistics = {n for n in end if "running_" in n or "num_batches" in n}
    assert heads <= moved and "clip.token_embedding.weight" in moved
    assert bool(moved & vision) == (config.freeze == "none")
    assert bool(moved & statistics) == (config.method == "clip")  # batch norm stands still but in CLIP's own pretraining
    assert {p.name for p in out.iterdir()} == {"last.pt", "best.pt", "metrics.jsonl", "loss.png", "data.json"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["clip", "xpool", "tmass"])
def test_a_training_run_beats_chance(config, clips_folder, tmp_path, method):
    """16 clips are learned by heart: validation holds the same clips under other names."""
    videos = tmp_path / "videos"
    shutil.copytree(clips_folder / "clips", videos)
    rows = [line.split(",", 1) for line in (clips_folder / "clips.csv").read_text().splitlines()[1:] if line.endswith(",train")]
    for name in {name for name, _ in rows}:
        shutil.copy(videos / name, videos / f"again-{name}")
    lines = [f"{name},{rest}" for name, rest in rows] + [f"again-{name},{rest[: -len('train')]}val" for name, rest in rows]
    (tmp_path / "twice.csv").write_text("\n".join(["video,caption,split", *lines]))
    torch.save(small_clip("vit").state_dict(), tmp_path / "vit.pt")
    config = replace(config, method=method, annotations=tmp_path / "twice.csv", videos=videos, weights=tmp_path / "vit.pt", batch=16, epochs=30,
                     augment=False, weight_decay=0.01)  # fmt: skip
    losses = [row for row in read_log(train.train(config)) if "loss" in row]
    best = load_file(config.out / "best.pt")["val"]["t2v"]
    assert losses[-1]["loss"] < 0.4 * losses[0]["loss"]
    assert best["R@1"] > 50 and best["MnR"] < 3  # chance: 6 and 8.5


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(config, tmp_path):
    a, b, c = (train.train(replace(config, max_steps=2, out=tmp_path / n, seed=s)) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert same_weights(a / "last.pt", b / "last.pt") and not same_weights(a / "last.pt", c / "last.pt")


def test_checkpoint_says_what_made_it(config):
    out = train.train(replace(config, max_steps=1))
    content = load_file(out / "best.pt")
    assert content["config"]["batch"] == 8 and content["config"]["videos"] == str(config.videos)
    assert content["step"] == 1 and len(content["data"]) == 64 and content["commit"] and "R@1" in content["val"]["t2v"]
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
    with pytest.raises(ModelError, match="other clips or captions"):  # one turns up: this is another training set
        shutil.copy(clips_folder / "clips" / "clip00003.mp4", videos)
        train.train(replace(config, max_steps=1, videos=videos, resume=True))


def test_random_sampling_trains_on_other_frames_each_epoch_and_validates_on_midpoints(config, tmp_path):
    runs = [
        train.train(replace(config, max_steps=2, augment=False, sampling=s, out=tmp_path / f"{s}{n}"))
        for n, s in enumerate(("uniform", "random", "random"))
    ]
    assert not same_weights(runs[0] / "last.pt", runs[1] / "last.pt") and same_weights(runs[1] / "last.pt", runs[2] / "last.pt")


def test_a_frozen_trunk_needs_neither_videos_nor_frames_once_its_features_are_kept(config, clips_folder, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(clips_folder / "clips", videos)
    config = replace(config, max_steps=2, freeze="vision", augment=False, videos=videos)
    one = train.train(config)
    cached = list((config.data / "cache").rglob("*.zip"))
    for path in [*cached, *videos.iterdir()]:
        path.unlink()
    two = train.train(replace(config, out=tmp_path / "again"))
    assert len(cached) == 20 and same_weights(one / "last.pt", two / "last.pt")


# ------------------------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("options", [dict(), dict(freeze="vision", augment=False)])
def test_a_run_stopped_by_a_signal_and_resumed_equals_one_never_stopped(config, tmp_path, monkeypatch, options):
    config = replace(config, epochs=2, max_steps=17, **options)  # 10 steps an epoch: stopped in the second
    whole = train.train(replace(config, out=tmp_path / "whole"))
    calls, loss = [], train.tmass_loss

    def with_a_signal(*arguments):
        calls.append(1)
        if len(calls) == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    monkeypatch.setattr(train, "tmass_loss", with_a_signal)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 13 of 17: go on with .* --resume"):
        train.train(config)
    assert load_file(config.out / "last.pt")["step"] == 13
    out = train.train(replace(config, resume=True))
    assert len(calls) == 17  # no step twice
    assert same_weights(whole / "last.pt", out / "last.pt") and same_weights(whole / "best.pt", out / "best.pt")
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in read_log(o)] for o in (whole, out)]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_run_killed_outright_and_resumed_equals_one_never_stopped(config, tmp_path):
    flags = {"--annotations": config.annotations, "--videos": config.videos, "--data": config.data, "--weights": config.weights, "--num-frames": 3,
             "--batch": 8, "--clip-lr": 1e-3, "--max-steps": 9, "--save-every": 1, "--device": "cpu"}  # fmt: skip
    command = [sys.executable, ROOT / "train.py", "--dataset", "csv", "--arch", "tiny", *(str(x) for pair in flags.items() for x in pair)]
    subprocess.run([*command, "--out", tmp_path / "whole"], check=True, capture_output=True)
    process = subprocess.Popen([*command, "--out", tmp_path / "run"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not ((tmp_path / "run" / "last.pt").exists() and load_file(tmp_path / "run" / "last.pt")["step"] >= 3):
        time.sleep(0.01)
    process.kill()
    process.wait()
    subprocess.run([*command, "--out", tmp_path / "run", "--resume"], check=True, capture_output=True)
    assert same_weights(tmp_path / "whole" / "last.pt", tmp_path / "run" / "last.pt")


def test_resume_refuses_another_config_other_data_and_a_foreign_file(config, clips_folder, tmp_path):
    train.train(replace(config, max_steps=1))
    with pytest.raises(ModelError, match="holds a run: add --resume"):
        train.train(replace(config, max_steps=1))
    with pytest.raises(ModelError, match=r"another config \(alpha 1.2 -> 0.5\)"):
        train.train(replace(config, max_steps=1, resume=True, alpha=0.5))
    less = tmp_path / "less.csv"
    less.write_text((clips_folder / "clips.csv").read_text().replace(" ", "  "))
    with pytest.raises(ModelError, match="other clips or captions"):
        train.train(replace(config, max_steps=1, resume=True, annotations=less))
    shutil.copy(config.out / "best.pt", config.out / "last.pt")
    with pytest.raises(ModelError, match=r"not a last\.pt"):
        train.train(replace(config, max_steps=1, resume=True))
    assert train.train(replace(config, max_steps=1, out=tmp_path / "new", resume=True)) == tmp_path / "new"  # nothing there: it starts


def test_a_finished_run_is_left_as_it_is_and_a_new_one_takes_a_new_folder(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    one, two = (train.train(replace(config, out=None, max_steps=1)) for _ in range(2))
    assert (str(one), str(two)) == ("runs/csv-tiny-tmass", "runs/csv-tiny-tmass-2")
    before = (one / "metrics.jsonl").read_text()
    train.train(replace(config, out=one, max_steps=1, resume=True))
    assert (one / "metrics.jsonl").read_text() == before


# ------------------------------------------------------------------------------------------------------------------ bad input, CLI


def test_bad_input_gives_one_sentence_and_no_traceback(clips_folder, weights, tmp_path):
    """Every mistake, through the command line: exit code 1, one line, no traceback."""
    good = {"--dataset": "csv", "--annotations": clips_folder / "clips.csv", "--videos": clips_folder / "clips", "--data": tmp_path / "data",
            "--arch": "tiny", "--weights": weights, "--num-frames": 3, "--max-steps": 1}  # fmt: skip
    (tmp_path / "column.csv").write_text("clip,caption\na,b\n")
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("text.mp4", "good1.mp4", "good2.mp4"):
        shutil.copy(clips_folder / "clips" / "clip00000.mp4", videos / name)
    (videos / "text.mp4").write_text("<html>")
    (tmp_path / "unreadable.csv").write_text("video,caption,split\ntext.mp4,a,val\ngood1.mp4,b,train\ngood2.mp4,c,train\n")
    cut = tmp_path / "cut"
    cut.mkdir()
    whole = (clips_folder / "clips" / "clip00000.mp4").read_bytes()
    (cut / "cut.mp4").write_bytes(whole[: len(whole) - 2000])
    shutil.copy(clips_folder / "clips" / "clip00001.mp4", cut / "good2.mp4")
    (tmp_path / "truncated.csv").write_text("video,caption,split\ncut.mp4,a,train\ngood2.mp4,c,val\n")
    (tmp_path / "corrupt.pt").write_bytes(b"not a checkpoint")
    torch.save(small_clip().state_dict(), tmp_path / "foreign.pt")

    mistakes = {
        "gone.csv not found": ("train", {"--annotations": tmp_path / "gone.csv"}),
        "column.csv needs the columns": ("train", {"--annotations": tmp_path / "column.csv"}),
        "none of the 1 val clips can be read": ("train", {"--annotations": tmp_path / "unreadable.csv", "--videos": videos}),
        "cut.mp4 ": ("train", {"--annotations": tmp_path / "truncated.csv", "--videos": cut}),
        "unknown arch 'ViT-Z'": ("train", {"--arch": "ViT-Z", "--weights": None}),
        "gone.pt not found": ("train", {"--weights": tmp_path / "gone.pt"}),
        "corrupt.pt is not a file of weights": ("train", {"--weights": tmp_path / "corrupt.pt"}),
        "finds no CUDA device": ("train", {"--device": "cuda"}),
        "add --no-augment": ("train", {"--freeze": "vision"}),
        "LSMDC needs LSMDC16_annos_training.csv": ("train", {"--dataset": "lsmdc", "--annotations": None, "--videos": None}),
        "no checkpoint under runs": ("evaluate", {}),
        "none/best.pt not found": ("evaluate", {"--checkpoint": tmp_path / "none/best.pt"}),
        "corrupt.pt is not a file of weights, or is damaged": ("evaluate", {"--checkpoint": tmp_path / "corrupt.pt"}),
        "foreign.pt is not a checkpoint of train.py": ("evaluate", {"--checkpoint": tmp_path / "foreign.pt"}),
        "finds no CUDA device on this machine": ("evaluate", {"--checkpoint": tmp_path / "foreign.pt", "--device": "cuda"}),
    }
    if torch.cuda.is_available():
        mistakes = {says: mistake for says, mistake in mistakes.items() if "CUDA" not in says}

    def run(mistake):
        program, changes = mistake
        flags = {**(good if program == "train" else {}), **changes}
        command = [sys.executable, str(ROOT / f"{program}.py"), *(str(x) for pair in flags.items() if pair[1] is not None for x in pair)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    with ThreadPoolExecutor(2) as pool:
        for (says, mistake), done in zip(mistakes.items(), pool.map(run, mistakes.values())):
            errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert done.returncode == 1, (mistake, done.stdout, done.stderr)
            assert len(errors) == 1 and says in errors[0] and "Traceback" not in done.stderr, (mistake, done.stderr)


def test_no_validation_clips_is_said_before_training(config, clips_folder, tmp_path):
    (tmp_path / "train.csv").write_text("".join(line for line in (clips_folder / "clips.csv").open() if not line.rstrip().endswith(("val", "test"))))
    with pytest.raises(DataError, match="no clip has split 'val'"):
        train.train(replace(config, annotations=tmp_path / "train.csv"))


# --------------------------------------------------------------------------------------------------------------- the real models


@pytest.mark.slow
@pytest.mark.parametrize("patch", [32, 16])
def test_vit_b_at_full_size_takes_a_step_and_is_evaluated(clips_folder, tmp_path, patch):
    """Random weights of ViT-B/32 and ViT-B/16 in OpenAI's archive format: the path that the real ones take."""
    from model import _import_clip

    clip = _import_clip().model.CLIP(512, 224, 12, 768, patch, 77, 49408, 512, 8, 12).float().eval()
    archive = tmp_path / "ViT-B.pt"
    torch.jit.trace(clip, (torch.zeros(1, 3, 224, 224), torch.ones(1, 77, dtype=torch.long)), check_trace=False).save(archive)
    lines = (clips_folder / "clips.csv").read_text().splitlines()
    chosen = [line for line in lines[1:] if line.startswith(("clip00000", "clip00001", "clip00016", "clip00020"))]
    (tmp_path / "few.csv").write_text("\n".join([lines[0], *chosen]))
    flags = {"--dataset": "csv", "--annotations": tmp_path / "few.csv", "--videos": clips_folder / "clips", "--data": tmp_path / "data",
             "--arch": archive, "--num-frames": 2, "--batch": 2, "--max-steps": 1, "--out": tmp_path / "run"}  # fmt: skip
    train.main([str(x) for pair in flags.items() for x in pair])
    del clip
    import evaluate

    evaluate.main(["--checkpoint", str(tmp_path / "run"), "--data", str(tmp_path / "data"), "--M", "2"])
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["texts"] == 5 and result["videos"] == 1 and result["metrics"]["t2v"]["R@1"] == 100
    shutil.rmtree(tmp_path)
