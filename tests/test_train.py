"""Training: what learns, the loss, micro-batches, precision, resuming, and mistakes in the input."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, randn, small_clip
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import train
from engine.backbone import import_clip, tiny_mark
from engine.checkpoint import open_checkpoint
from engine.config import METHODS, RECIPES, Config
from engine.experiment import read_log
from engine.files import DataError, ModelError
from engine.optim import TrainState, compile_encoders, train_mode
from engine.weights import load_file
from losses import cosine_scores, symmetric_cross_entropy
from model import TMASS
from train import Encoder, train_step


def csv_config(clips_folder: Path, weights: Path, folder: Path) -> Config:
    """16 training clips, of a model with 24 channels."""
    clips = dict(annotations=clips_folder / "clips.csv", videos=clips_folder / "clips", data=folder / "data")
    sizes = dict(
        arch="tiny", weights=weights, num_frames=3, batch=8, epochs=1, clip_lr=1e-3, head_lr=1e-3, M=4
    )
    return Config(dataset="csv", out=folder / "run", device="cpu", **clips, **sizes)


@pytest.fixture
def config(clips_folder, weights, tmp_path) -> Config:
    return csv_config(clips_folder, weights, tmp_path)


def of_method(config: Config, method: str, **options) -> Config:
    """The config with the psi and R of a method."""
    fusion, radius = METHODS[method]
    return replace(config, **{"method": method, "fusion": fusion, "radius": radius, **options})


def same_weights(a: Path, b: Path) -> bool:
    one, two = (load_file(path)["model"].values() for path in (a, b))
    return all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method, options", [
    ("tmass", {}), ("tmass", dict(pairs="every", prior="uniform")), ("xpool", dict(heads=2)), ("clip", {}),
    ("tmass", dict(freeze="vision", augment=False)), ("tmass", dict(freeze="clip", augment=False)),
    ("tmass", RECIPES["best"]), ("tmass", dict(fusion="mean")), ("tmass", dict(radius="none")),
])  # fmt: skip
def test_training_changes_what_should_learn_and_nothing_else(config, method, options):
    config = of_method(config, method, max_steps=2, **options)
    torch.manual_seed(config.seed)
    start = {name: value.clone() for name, value in train.build(config).state_dict().items()}
    out = train.train(config)
    end = load_file(out / "last.pt")["model"]
    moved = {name for name in end if not torch.equal(start[name], end[name])}
    vision = {name for name in end if name.startswith("clip.visual.")}
    heads = {name for name in end if not name.startswith("clip.")}
    statistics = {name for name in end if "running_" in name or "num_batches" in name}
    assert heads <= moved and "clip.logit_scale" in moved
    assert bool(heads) == ((config.fusion, config.radius) != ("mean", "none"))
    assert ("clip.token_embedding.weight" in moved) == (config.freeze != "clip")
    assert config.freeze != "clip" or moved == {*heads, "clip.logit_scale"}
    assert bool(moved & vision) == (config.freeze == "none")
    assert bool(moved & statistics) == (config.method == "clip")  # BatchNorm learns only with CLIP itself
    assert {p.name for p in out.iterdir()} == {"last.pt", "best.pt", "metrics.jsonl", "loss.png", "data.json"}


def test_a_frozen_clip_gives_the_features_of_the_whole_one(config, tmp_path, monkeypatch):
    """t and f of the first step: from the cache (clip), f alone from it (vision), both computed (none)."""
    seen, forward = {}, train.forward

    def look(model, text, frames, c):
        seen[c.freeze] = text, frames
        return forward(model, text, frames, c)

    monkeypatch.setattr(train, "forward", look)
    for freeze in ("clip", "vision", "none"):
        train.train(replace(config, freeze=freeze, augment=False, max_steps=1, out=tmp_path / freeze))
    for freeze in ("clip", "vision"):
        for kept, computed in zip(seen[freeze], seen["none"], strict=True):
            torch.testing.assert_close(kept, computed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(pairs="every"), {**RECIPES["best"], "alpha": 0.3}])
def test_the_loss_is_the_sum_of_its_parts_by_their_weights(config, options):
    """L = L_s + alpha L_sup + ce L_ce, L_ce that of t itself."""
    config = replace(config, **{**options, "ce": 0.7})
    model = train.build(config)
    text, frames = randn(5, 24), randn(5, 3, 24, seed=1)
    loss, parts = train.forward(model.eval(), text, frames, config)
    torch.testing.assert_close(loss, parts["L_s"] + config.alpha * parts["L_sup"] + 0.7 * parts["L_ce"])
    text_scores = cosine_scores(text, model.fusion(text, frames))
    torch.testing.assert_close(parts["L_ce"], symmetric_cross_entropy(text_scores, model.logit_scale.exp()))


@pytest.mark.parametrize("method", ["clip", "xpool"])
def test_without_a_mass_the_loss_is_that_of_t(config, method):
    config = of_method(config, method)
    model = train.build(config).eval()
    text, frames = randn(5, 24), randn(5, 3, 24, seed=1)
    loss, parts = train.forward(model, text, frames, config)
    scores = cosine_scores(text, model.fusion(text, frames))
    torch.testing.assert_close(loss, symmetric_cross_entropy(scores, model.logit_scale.exp()))
    assert parts == {"L_ce": loss}


@pytest.mark.slow
@pytest.mark.pictures
@pytest.mark.parametrize("method", ["clip", "xpool", "tmass"])
def test_a_training_run_beats_chance(config, clips_folder, tmp_path, method):
    """16 clips are memorised: the validation split holds the same clips under other names."""
    videos = tmp_path / "videos"
    shutil.copytree(clips_folder / "clips", videos)
    rows = [
        line.split(",", 1)
        for line in (clips_folder / "clips.csv").read_text().splitlines()[1:]
        if line.endswith(",train")
    ]
    for name in {name for name, _ in rows}:
        shutil.copy(videos / name, videos / f"again-{name}")
    lines = [f"{name},{rest}" for name, rest in rows]
    lines += [f"again-{name},{rest[: -len('train')]}val" for name, rest in rows]
    (tmp_path / "twice.csv").write_text("\n".join(["video,caption,split", *lines]))
    torch.save(small_clip("vit").state_dict(), tmp_path / "vit.pt")
    sources = dict(annotations=tmp_path / "twice.csv", videos=videos, weights=tmp_path / "vit.pt")
    flags = dict(batch=16, epochs=10, augment=False, weight_decay=0.01)
    if method != "clip":  # frames are encoded once
        flags |= dict(freeze="vision", epochs=15)
    config = of_method(config, method, **flags, **sources)
    losses = [row for row in read_log(train.train(config)) if "loss" in row]
    best = load_file(config.out / "best.pt")["val"]["t2v"]
    assert losses[-1]["loss"] < 0.6 * losses[0]["loss"]
    assert best["R@1"] > 25 and best["MnR"] < 3.5  # chance: 6 and 8.5


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(config, tmp_path):
    seeds = {"a": 0, "b": 0, "c": 1}
    a, b, c = (train.train(replace(config, max_steps=2, out=tmp_path / n, seed=s)) for n, s in seeds.items())
    assert same_weights(a / "last.pt", b / "last.pt") and not same_weights(a / "last.pt", c / "last.pt")


def test_a_run_from_another_tiny_clip_is_named_and_not_continued(config, monkeypatch):
    tiny = replace(config, weights=None, max_steps=1)
    out = train.train(tiny)
    assert open_checkpoint(out)[1]["tiny_clip"] == tiny_mark()
    monkeypatch.setattr("engine.backbone.tiny_mark", lambda: "another")
    with pytest.raises(ModelError, match=r"last.pt was trained from another tiny CLIP .*remove"):
        train.train(replace(tiny, max_steps=2, out=out, resume=True))


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


@pytest.mark.slow
def test_random_sampling_trains_on_other_frames_each_epoch_and_validates_on_midpoints(config, tmp_path):
    runs = [
        train.train(replace(config, max_steps=2, augment=False, sampling=s, out=tmp_path / f"{s}{n}"))
        / "last.pt"
        for n, s in enumerate(("uniform", "random", "random"))
    ]
    assert not same_weights(runs[0], runs[1]) and same_weights(runs[1], runs[2])


def test_a_frozen_trunk_needs_neither_videos_nor_frames_once_its_features_are_kept(
    config, clips_folder, tmp_path
):
    videos = tmp_path / "videos"
    shutil.copytree(clips_folder / "clips", videos)
    config = replace(config, max_steps=2, freeze="vision", augment=False, videos=videos)
    one = train.train(config)
    cached = list((config.data / "cache").rglob("*.zip"))
    for path in [*cached, *videos.iterdir()]:
        path.unlink()
    two = train.train(replace(config, out=tmp_path / "again"))
    assert len(cached) == 20 and same_weights(one / "last.pt", two / "last.pt")


# ------------------------------------------------------------------------------------------------- the step


def a_step(batch: int = 7, trunk: str = "vit", steps: int = 1, **options) -> tuple[TrainState, torch.Tensor]:
    """The state after `steps` steps of a small model on random pairs, and the last loss."""
    fusion, radius = METHODS[options.get("method", "tmass")]
    sizes = dict(num_frames=3, batch=batch, clip_lr=1e-3, head_lr=1e-3, augment=False)
    config = Config(**{**sizes, "fusion": fusion, "radius": radius, **options})
    torch.manual_seed(1)
    model = TMASS(small_clip(trunk), fusion, radius, num_frames=3)
    train_mode(model, config)
    compile_encoders(model, config.compile)
    state, encoder = TrainState(model, config, total=10), Encoder(model, config)
    images = torch.randint(0, 255, (batch, 3, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.randint(1, 49000, (batch, 20))
    for _ in range(steps):
        loss, _ = train_step(state, encoder, images, tokens, config, batch)
    return state, loss


def gradients(state: TrainState) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in state.model.parameters()])


@pytest.mark.parametrize("trunk", ["vit", "resnet"])
@pytest.mark.parametrize("micro_batch", [1, 3, 7])
def test_micro_batches_give_loss_and_gradients_of_one_batch(trunk, micro_batch):
    one, loss = a_step(trunk=trunk)
    several, same_loss = a_step(trunk=trunk, micro_batch=micro_batch)
    assert torch.allclose(loss, same_loss, rtol=1e-5) and len(gradients(one)) > 10**6
    assert (gradients(one) - gradients(several)).norm() < 1e-5 * gradients(one).norm()


def test_gradients_of_micro_batches_are_not_those_of_small_batches():
    whole, small = a_step(batch=6, micro_batch=3)[0], a_step(batch=3)[0]
    assert (gradients(whole) - gradients(small)).norm() > 0.1 * gradients(whole).norm()


class Watch(TorchDispatchMode):
    """Counts the bytes of all living tensors, and the values read back from the device."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.reads, self.seen = 0, 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        aten = torch.ops.aten
        self.reads += function in (aten._local_scalar_dense.default, aten.nonzero.default)
        for tensor in out if isinstance(out, tuple | list) else [out]:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, size):
        self.now -= size


def test_micro_batches_need_little_memory(monkeypatch):
    def peak(batch, **options):
        with Watch() as watch:
            a_step(batch, **options)
        return watch.peak

    # The gradient of the embedding is as large as everything else.
    monkeypatch.setattr(nn.Embedding, "forward", lambda self, tokens: self.weight.detach()[tokens])
    weights = peak(1)
    assert peak(48, micro_batch=4) - weights < 0.35 * (peak(48) - weights)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_step_reads_nothing_back_from_the_device(amp):
    with Watch() as watch:
        a_step(amp=amp, micro_batch=4)
    assert watch.reads == 0


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights_to_about_the_same_loss(amp):
    (_, exact), (_, half), (state, end) = a_step(), a_step(amp=amp), a_step(amp=amp, steps=12)
    assert {p.dtype for p in state.model.parameters()} == {torch.float32} == {half.dtype}
    assert exact != half and math.isclose(exact.item(), half.item(), rel_tol=0.02)
    assert end < 0.5 * half and state.scaler.is_enabled() == (amp == "fp16")


def test_batch_norm_that_learns_refuses_parts_of_a_batch(config):
    with pytest.raises(ModelError, match=r"--method clip trains the batch norm .* leave out --micro-batch"):
        train.train(of_method(config, "clip", micro_batch=4))


# -------------------------------------------------------------------------------- mistakes, the command line


def test_ctrl_c_before_the_first_step_says_that_it_stopped(monkeypatch, capsys):
    monkeypatch.setattr(train, "train", lambda config: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        train.main([])
    assert ended.value.code == 130 and capsys.readouterr().out == "stopped\n"


def test_a_lack_of_memory_names_the_flags_that_need_less(config, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "forward", full)
    with pytest.raises(ModelError, match=r"2\.00 GiB.*: lower --micro-batch or --batch, or use --amp bf16"):
        train.train(config)


def test_the_start_says_how_many_captions_an_epoch_leaves_out(config, clips_folder, tmp_path, capsys):
    """As with MSVD, whose clips have 17 to 81: batches of one size, for any number of processes."""
    lines = (clips_folder / "clips.csv").read_text().splitlines(keepends=True)
    fewer = [line for number, line in enumerate(lines) if not line.startswith("clip00001") or number % 5 == 0]
    (tmp_path / "fewer.csv").write_text("".join(fewer))
    train.train(replace(config, annotations=tmp_path / "fewer.csv", max_steps=1))
    captions = sum(line.endswith(("train\n", "train")) for line in fewer)
    left = re.search(rf"\(an epoch leaves out (\d+) of {captions} captions", capsys.readouterr().out)
    clips, _ = train.read_data(replace(config, annotations=tmp_path / "fewer.csv"))
    batches = train.epoch_batches(clips, 8, 0, 3)
    assert int(left[1]) == captions - sum(map(len, batches)) > 0 and {len(b) for b in batches} == {8}
    train.train(replace(config, max_steps=1, out=tmp_path / "all"))
    assert "leaves out" not in capsys.readouterr().out


def test_bad_input_gives_one_sentence_and_no_traceback(clips_folder, weights, tmp_path, monkeypatch):
    """Every mistake, through main: one line."""
    good = {
        "--dataset": "csv", "--annotations": clips_folder / "clips.csv", "--videos": clips_folder / "clips",
        "--data": tmp_path / "data", "--arch": "tiny", "--weights": weights, "--num-frames": 3,
        "--max-steps": 1,
    }  # fmt: skip
    (tmp_path / "column.csv").write_text("clip,caption\na,b\n")
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("text.mp4", "good1.mp4", "good2.mp4"):
        shutil.copy(clips_folder / "clips" / "clip00000.mp4", videos / name)
    (videos / "text.mp4").write_text("<html>")
    (tmp_path / "unreadable.csv").write_text(
        "video,caption,split\ntext.mp4,a,val\ngood1.mp4,b,train\ngood2.mp4,c,train\n"
    )
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
        "none of the 1 val clips can be read": (
            "train",
            {"--annotations": tmp_path / "unreadable.csv", "--videos": videos},
        ),
        "cut.mp4 ": ("train", {"--annotations": tmp_path / "truncated.csv", "--videos": cut}),
        "unknown arch 'ViT-Z'": ("train", {"--arch": "ViT-Z", "--weights": None}),
        "gone.pt not found": ("train", {"--weights": tmp_path / "gone.pt"}),
        "corrupt.pt is not a file of weights": ("train", {"--weights": tmp_path / "corrupt.pt"}),
        "--device cuda: torch cannot compute there": ("train", {"--device": "cuda"}),
        "add --no-augment": ("train", {"--freeze": "vision"}),
        "5 heads do not divide 24 channels": ("train", {"--heads": 5}),
        "--method xpool means --fusion xpool --radius none": (
            "train",
            {"--method": "xpool", "--radius": "fixed"},
        ),
        "lsmdc needs LSMDC16_annos_training.csv": (
            "train",
            {"--dataset": "lsmdc", "--annotations": None, "--videos": None},
        ),
        "no checkpoint under runs": ("evaluate", {}),
        "none/best.pt not found": ("evaluate", {"--checkpoint": tmp_path / "none/best.pt"}),
        "corrupt.pt is not a file of weights, or is damaged": (
            "evaluate",
            {"--checkpoint": tmp_path / "corrupt.pt"},
        ),
        "foreign.pt is not a checkpoint of train.py": ("evaluate", {"--checkpoint": tmp_path / "foreign.pt"}),
        "torch cannot compute there": (
            "evaluate",
            {"--checkpoint": tmp_path / "foreign.pt", "--device": "cuda"},
        ),
    }
    if torch.cuda.is_available():
        mistakes = {says: mistake for says, mistake in mistakes.items() if "torch cannot compute" not in says}

    monkeypatch.chdir(tmp_path)
    for says, (program, changes) in mistakes.items():
        flags = {**(good if program == "train" else {}), **changes}
        arguments = [str(x) for pair in flags.items() if pair[1] is not None for x in pair]
        with pytest.raises(SystemExit) as ended:
            (train if program == "train" else evaluate).main(arguments)
        sentence = ended.value.code
        assert sentence.startswith("error: ") and says in sentence and "\n" not in sentence, (says, sentence)
    # The last of them, as a user sees it.
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == ended.value.code
    assert "Traceback" not in done.stderr


def test_the_command_line_trains_with_its_flags(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "train", seen.append)
    train.main(["--recipe", "best", "--fusion", "mean"])
    assert (seen[0].recipe, seen[0].fusion, seen[0].radius) == ("best", "mean", "joint")


def test_no_validation_clips_is_said_before_training(config, clips_folder, tmp_path):
    lines = (clips_folder / "clips.csv").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.rstrip().endswith(("val", "test"))]
    (tmp_path / "train.csv").write_text("".join(kept))
    with pytest.raises(DataError, match="no clip has split 'val'"):
        train.train(replace(config, annotations=tmp_path / "train.csv"))


# ------------------------------------------------------------------------------------------ the real models


@pytest.mark.slow
@pytest.mark.parametrize("patch", [32])  # ViT-B/16 differs only in the patch, and takes twice as long
def test_vit_b_at_full_width_takes_a_step_and_is_evaluated(clips_folder, tmp_path, monkeypatch, patch):
    """Random weights of ViT-B/32 with three of its twelve layers, in OpenAI's archive format, opened as the
    real ones are."""
    monkeypatch.setattr("engine.files.os.fsync", lambda file: None)  # 2 GiB of checkpoints need no disk
    clip = import_clip().model.CLIP(512, 224, 3, 768, patch, 77, 49408, 512, 8, 3).float().eval()
    archive = tmp_path / "ViT-B.pt"
    inputs = torch.zeros(1, 3, 224, 224), torch.ones(1, 77, dtype=torch.long)
    torch.jit.trace(clip, inputs, check_trace=False).save(archive)
    lines = (clips_folder / "clips.csv").read_text().splitlines()
    names = ("clip00000", "clip00001", "clip00016", "clip00020")
    chosen = [line for line in lines[1:] if line.startswith(names)]
    (tmp_path / "few.csv").write_text("\n".join([lines[0], *chosen]))
    flags = {
        "--dataset": "csv", "--annotations": tmp_path / "few.csv", "--videos": clips_folder / "clips",
        "--data": tmp_path / "data", "--arch": archive, "--num-frames": 2, "--batch": 2, "--max-steps": 1,
        "--out": tmp_path / "run",
    }  # fmt: skip
    train.main([str(x) for pair in flags.items() for x in pair])
    del clip
    evaluate.main(["--checkpoint", str(tmp_path / "run"), "--data", str(tmp_path / "data"), "--M", "2"])
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["texts"] == 5 and result["videos"] == 1 and result["metrics"]["t2v"]["R@1"] == 100
    shutil.rmtree(tmp_path)
