import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, randn, small_clip
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import train
from data import DataError
from evaluate import open_checkpoint
from losses import cosine_scores, symmetric_cross_entropy
from model import TMASS, ModelError, load_file, save_checkpoint
from train import PRESETS, RECIPES, Config, State, learning_rate, parse, preset, read_log, train_mode, train_step


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
    assert parse(["--dataset", "lsmdc", "--head-lr", "0.1", "--amp", "off"]) == replace(preset("lsmdc", "tmass"), head_lr=0.1, amp="off")
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
    dict(freeze="clip", augment=False), RECIPES["best"],
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
    assert heads <= moved and "clip.logit_scale" in moved
    assert ("clip.token_embedding.weight" in moved) == (config.freeze != "clip")
    assert config.freeze != "clip" or moved == {*heads, "clip.logit_scale"}
    assert bool(moved & vision) == (config.freeze == "none")
    assert bool(moved & statistics) == (config.method == "clip")  # batch norm stands still but in CLIP's own pretraining
    assert {p.name for p in out.iterdir()} == {"last.pt", "best.pt", "metrics.jsonl", "loss.png", "data.json"}


def test_a_frozen_clip_gives_the_features_of_the_whole_one(config, tmp_path, monkeypatch):
    """The first step's t and f: kept (--freeze clip), kept in part (vision), and made anew (none, in eval mode as batch norm is)."""
    seen, head_loss = {}, train.head_loss

    def look(model, text, frames, c):
        seen[c.freeze] = text, frames
        return head_loss(model, text, frames, c)

    monkeypatch.setattr(train, "head_loss", look)
    for freeze in ("clip", "vision", "none"):
        train.train(replace(config, freeze=freeze, augment=False, max_steps=1, out=tmp_path / freeze))
    for freeze in ("clip", "vision"):
        for kept, made in zip(seen[freeze], seen["none"], strict=True):
            torch.testing.assert_close(kept, made, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(pairs="every"), {**RECIPES["best"], "alpha": 0.3}])
def test_the_loss_is_the_sum_of_its_parts_by_their_weights(config, options):
    """L = L_s + alpha L_sup + ce L_ce, L_ce that of t itself."""
    config = replace(config, **{**options, "ce": 0.7})
    model = train.build(config)
    text, frames = randn(5, 24), randn(5, 3, 24, seed=1)
    loss, parts = train.head_loss(model.eval(), text, frames, config)
    torch.testing.assert_close(loss, parts["L_s"] + config.alpha * parts["L_sup"] + 0.7 * parts["L_ce"])
    torch.testing.assert_close(parts["L_ce"], symmetric_cross_entropy(cosine_scores(text, model.fusion(text, frames)), model.logit_scale.exp()))


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


def test_the_run_that_pretrains_the_tiny_clip_starts_from_the_weights_of_later_ones(config, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "best.pt", TMASS(small_clip(), "clip"))
    starts = []
    for pretraining in (True, False):
        monkeypatch.setattr(train, "tiny_clip", lambda config, draws=pretraining: (torch.randn(3 if draws else 0), tmp_path)[1])
        starts.append(train.build(replace(config, weights=None)).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(starts[0].values(), starts[1].values()))


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


# ---------------------------------------------------------------------------------------------------------------------- the step


def a_step(batch: int = 7, trunk: str = "vit", steps: int = 1, **options) -> tuple[State, torch.Tensor]:
    """The state after `steps` steps of a small model on random pairs, and the last loss."""
    config = Config(num_frames=3, batch=batch, clip_lr=1e-3, head_lr=1e-3, augment=False, **options)
    torch.manual_seed(1)
    model = TMASS(small_clip(trunk), config.method, num_frames=3)
    train_mode(model, config)
    train.compile_encoders(model, config.compile)
    state = State(model, config, total=10)
    images = torch.randint(0, 255, (batch, 3, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.randint(1, 49000, (batch, 20))
    for _ in range(steps):
        loss, _ = train_step(state, images, tokens, config, batch)
    return state, loss


def gradients(state: State) -> torch.Tensor:
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
    """Counts the bytes of tensors that live at once, and what is read back from the device (on a GPU each such read waits)."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.reads, self.seen = 0, 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        self.reads += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
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

    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda self, tokens: self.weight.detach()[tokens])  # its gradient is as large as all else
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


def test_compiled_encoders_keep_the_names_of_checkpoints():
    model = TMASS(small_clip("vit"))
    names = list(model.state_dict())
    train.compile_encoders(model, "auto")
    assert model.clip.visual._compiled_call_impl is None  # on the CPU only when asked for
    train.compile_encoders(model, "on")
    assert model.clip.visual._compiled_call_impl and model.clip.transformer._compiled_call_impl and list(model.state_dict()) == names


@pytest.mark.parametrize("options", [dict(micro_batch=3), dict(trunk="resnet", amp="bf16")], ids=["vit, micro-batches", "resnet, bf16"])
def test_compiled_encoders_give_loss_and_gradients_of_eager_ones(monkeypatch, options):
    """Captured whole, with no break in the graph; run by torch itself, because to generate code takes a minute."""
    eager, loss = a_step(**options)
    normal, compiled = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(normal(module, backend="aot_eager", fullgraph=True)))
    other, same_loss = a_step(compile="on", **options)
    assert len(compiled) == 2 and torch.allclose(loss, same_loss, rtol=1e-5)
    assert (gradients(eager) - gradients(other)).norm() < 1e-5 * gradients(eager).norm()


def test_batch_norm_that_learns_refuses_parts_of_a_batch(config):
    with pytest.raises(ModelError, match=r"--method clip trains the batch norm .* leave --micro-batch away"):
        train.train(replace(config, method="clip", micro_batch=4))


# ---------------------------------------------------------------------------------------------------------- steps that are not finite


@pytest.mark.parametrize("options", [dict(), dict(amp="fp16"), dict(method="clip", trunk="resnet")], ids=["off", "fp16", "batch norm"])
@pytest.mark.parametrize("what", ["loss", "only loss", "gradient", "features"])
def test_step_that_is_not_finite_is_skipped_and_counted(monkeypatch, options, what):
    """Weights, statistics and AdamW's state stay; the schedule goes on; the next step is as good as ever."""
    normal, calls = train.head_loss, []

    def broken(model, text, frames, config):
        calls.append(1)
        spoil = torch.full_like(text, torch.nan if what == "features" and len(calls) == 6 else 1.0)
        loss, parts = normal(model, text * spoil, frames, config)
        if what != "features" and len(calls) == 6:
            spoilt = {"loss": loss * torch.inf, "only loss": loss + torch.inf, "gradient": loss + (0 * text.sum()).sqrt()}
            loss = spoilt[what]  # the second has a finite gradient; the third is finite, but not its gradient
        return loss, parts

    monkeypatch.setattr(train, "head_loss", broken)
    trunk = options.get("trunk", "vit")
    if trunk == "resnet" and what == "features":  # in the forward pass, so that the statistics see it too
        monkeypatch.setattr(train.data, "normalise", lambda images: images / 255 if len(calls) != 5 else images * torch.nan)
    before, bad, after = (a_step(steps=steps, **options)[0] for steps in (5, 6, 7) if not calls.clear())  # fp16 finds its scale in the first three
    assert bad.guard.read() == (1 + before.guard.read()[0], None) and bad.step == 6 and before.guard.counts[1] == 0
    assert all(torch.equal(a, b) for a, b in zip(before.model.state_dict().values(), bad.model.state_dict().values()))
    moments = [state.optimizer.state_dict()["state"] for state in (before, bad)]
    assert all(torch.equal(moments[0][k][name], moments[1][k][name]) for k in moments[0] for name in moments[0][k])
    assert bad.schedule.get_last_lr() != before.schedule.get_last_lr()
    assert after.guard.read()[0] == bad.guard.read()[0]
    assert all(value.isfinite().all() for value in after.model.state_dict().values())
    assert not torch.equal(after.model.logit_scale, bad.model.logit_scale)
    if options.get("amp") == "fp16":
        assert bad.scaler.get_scale() == before.scaler.get_scale() / 2


def test_many_such_steps_in_a_row_end_training_with_the_clips(config, monkeypatch):
    normal, calls = train.tmass_loss, []

    def broken(*arguments):
        calls.append(1)
        loss, parts = normal(*arguments)
        return loss * (torch.nan if 5 <= len(calls) < 15 else 1), parts

    monkeypatch.setattr(train, "tmass_loss", broken)
    with pytest.raises(ModelError, match="10 steps in a row had a loss or gradient that is not finite, the last of them step 14, with") as error:
        train.train(replace(config, epochs=3))
    clips, _ = train.read_data(config)
    order = train.data.epoch_batches(clips, 8, 0, 1)[3]  # step 14: the fourth of the second epoch
    assert all(clips[clip].id in str(error.value) for clip, _ in order) and str(error.value).count(".mp4") == 8
    assert [(row["step"], row["skipped"]) for row in read_log(config.out) if "loss" in row] == [(10, 6), (20, 10)]


# ------------------------------------------------------------------------------------------------------------------------ resume


def signal_in_step(number: int, monkeypatch) -> list:
    """Has SIGTERM come in the middle of a step, the given one from now. Returns a list with an entry for each step."""
    calls, loss = [], train.tmass_loss

    def with_a_signal(*arguments):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    monkeypatch.setattr(train, "tmass_loss", with_a_signal)
    return calls


def same_rows(a: Path, b: Path) -> bool:
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in read_log(out)] for out in (a, b)]
    return rows[0] == rows[1]


@pytest.mark.parametrize("options, at", [
    (dict(), 13), (dict(freeze="vision", augment=False), 13), (dict(amp="fp16"), 13), (dict(micro_batch=3), 13), (dict(), 10),
], ids=["plain", "fixed features", "fp16", "micro-batches", "at an epoch's end"])  # fmt: skip
def test_a_run_stopped_by_a_signal_and_resumed_equals_one_never_stopped(config, tmp_path, monkeypatch, options, at):
    config = replace(config, epochs=2, max_steps=17, **options)  # 10 steps an epoch: stopped in the second, or before the first validation
    whole = train.train(replace(config, out=tmp_path / "whole"))
    calls = signal_in_step(at, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match=rf"stopped after step {at} of 17: go on with .* --resume"):
        train.train(config)
    assert load_file(config.out / "last.pt")["step"] == at
    out = train.train(replace(config, resume=True))
    assert len(calls) == 17  # no step twice
    assert same_weights(whole / "last.pt", out / "last.pt") and same_weights(whole / "best.pt", out / "best.pt")
    assert same_rows(whole, out)


KILLS = int(os.environ.get("TMASS_KILLS", 3))  # TMASS_KILLS=10 pytest -s -k killed: ten of them, and the steps they came after


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_weights_of_one_never_stopped(config, tmp_path):
    """kill -9 at a random moment: within a step, a validation, the writing of a checkpoint, or before the first step."""
    config = replace(config, epochs=1 + KILLS, max_steps=9 + 6 * KILLS, save_every=1)  # 10 steps an epoch
    whole = train.train(replace(config, out=tmp_path / "whole", save_every=0))
    context, rng = multiprocessing.get_context("forkserver"), random.Random()
    context.set_forkserver_preload(["train"])  # imported once: a start costs a fork

    def start():
        process = context.Process(target=quietly, args=(replace(config, resume=True), torch.get_num_threads()))
        process.start()
        return process

    last = config.out / "last.pt"

    def written() -> int | None:
        return last.stat().st_mtime_ns if last.exists() else None

    kills = []
    while len(kills) < KILLS:
        process, seen, newest = start(), 0, written()
        steps = rng.randint(0, 4)  # new checkpoints to see before the kill; none: at any time before the first
        end = time.monotonic() + (rng.random() if steps == 0 else 60)
        while process.is_alive() and seen < max(1, steps) and time.monotonic() < end:
            now = written()
            seen, newest = seen + (now != newest), now
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05 * (steps > 0))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before its last kill"
        kills.append(load_file(last)["step"] if last.exists() else 0)  # what is there is whole
    end = start()
    end.join()
    print("killed after steps", kills)
    assert end.exitcode == 0 and max(kills) > 0
    assert same_weights(whole / "last.pt", last) and same_weights(whole / "best.pt", config.out / "best.pt")
    assert same_rows(whole, config.out)


def quietly(config: Config, threads: int) -> None:
    """train, in a process of its own: with as many threads, on which sums depend."""
    torch.set_num_threads(threads)
    with open(os.devnull, "w") as sys.stdout, open(os.devnull, "w") as sys.stderr:
        train.train(config)


def test_a_run_killed_in_its_validation_loses_no_step(config, tmp_path, monkeypatch):
    config = replace(config, max_steps=3)
    whole = train.train(replace(config, out=tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "validate", lambda *_: os.kill(os.getpid(), signal.SIGINT) or os.kill(os.getpid(), signal.SIGINT))  # Ctrl-C twice
        train.train(config)
    calls = signal_in_step(0, monkeypatch)
    train.train(replace(config, resume=True))
    assert calls == [] and same_weights(whole / "last.pt", config.out / "last.pt") and same_rows(whole, config.out)
    assert load_file(config.out / "last.pt")["val"] == load_file(whole / "best.pt")["val"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_full_disk_ends_a_run_with_one_sentence_and_loses_nothing_older(config, tmp_path, monkeypatch):
    config = replace(config, max_steps=3)
    whole = train.train(replace(config, out=tmp_path / "whole"))
    signal_in_step(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    before = (config.out / "last.pt").read_bytes()
    (config.out / ".last.pt.part").symlink_to("/dev/full")  # each write to it fails as on a full disk
    with pytest.raises(ModelError, match=r"last\.pt could not be written \(No space left on device\)"):
        train.train(replace(config, resume=True))
    assert (config.out / "last.pt").read_bytes() == before
    with (config.out / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "lo')  # a row that found no room
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
    assert train.train(replace(config, max_steps=1, out=tmp_path / "new", resume=True)) == tmp_path / "new"  # nothing there: it starts


def test_a_finished_run_is_left_as_it_is_and_a_new_one_takes_a_new_folder(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    one, two = (train.train(replace(config, out=None, max_steps=1)) for _ in range(2))
    assert (str(one), str(two)) == ("runs/csv-tiny-tmass", "runs/csv-tiny-tmass-2")
    before = (one / "metrics.jsonl").read_text()
    train.train(replace(config, out=one, max_steps=1, resume=True))
    assert (one / "metrics.jsonl").read_text() == before


# ------------------------------------------------------------------------------------------------------------------ bad input, CLI


def test_a_run_is_named_by_data_set_arch_and_method(weights):
    assert train.run_folder(Config(dataset="msrvtt")) == Path("runs/msrvtt-vit-b32-tmass")
    assert train.run_folder(Config(dataset="csv", arch="ViT-L/14@336px", method="xpool")) == Path("runs/csv-vit-l14336px-xpool")
    assert train.run_folder(Config(arch=str(weights))) == Path("runs/shapes-small-tmass")


@pytest.mark.parametrize("mistake, says", [
    (dict(batch=0), "--batch 0: give a number from 1 on"), (dict(micro_batch=-1), "--micro-batch -1"), (dict(max_steps=0), "--max-steps 0"),
    (dict(dropout=1.5), "--dropout 1.5: give a number from 0 to 1"), (dict(clip_lr=math.nan), "--clip-lr nan"), (dict(seed=-1), "--seed -1"),
    (dict(initial_radius=0), "--initial-radius 0"), (dict(num_frames=0), "--num-frames 0"), (dict(epochs=0), "--epochs 0"),
    (dict(pairs="expected", M=0), "--M 0 leaves --pairs expected no draw"),
])  # fmt: skip
def test_numbers_out_of_range_give_one_sentence(config, mistake, says):
    with pytest.raises(ModelError, match=says):
        train.train(replace(config, **mistake))


@pytest.mark.parametrize("config_class, ranges", [(Config, train.RANGES), (evaluate.EvaluationConfig, evaluate.RANGES)])
def test_every_number_of_a_config_has_a_range(config_class, ranges):
    numbers = {name for name, kind in config_class.__annotations__.items() if kind in (int, float, int | None, float | None)}
    assert numbers == set(ranges)
    evaluate.check_numbers(config_class(), ranges)


def test_presets_are_within_their_ranges():
    for dataset in Config.__annotations__["dataset"].__args__:
        for method in ("clip", "xpool", "tmass"):
            evaluate.check_numbers(preset(dataset, method), train.RANGES)


def test_a_folder_that_cannot_be_written_is_said_before_training(config, weights):
    with pytest.raises(ModelError, match=rf"{weights}/run could not be written \(Not a directory\)"):
        train.train(replace(config, out=weights / "run"))


def test_ctrl_c_before_the_first_step_says_that_it_stopped(monkeypatch, capsys):
    monkeypatch.setattr(train, "train", lambda config: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        train.main([])
    assert ended.value.code == 130 and capsys.readouterr().out == "stopped\n"


def test_bad_input_gives_one_sentence_and_no_traceback(clips_folder, weights, tmp_path, monkeypatch):
    """Every mistake, through main: one line."""
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
        "lsmdc needs LSMDC16_annos_training.csv": ("train", {"--dataset": "lsmdc", "--annotations": None, "--videos": None}),
        "no checkpoint under runs": ("evaluate", {}),
        "none/best.pt not found": ("evaluate", {"--checkpoint": tmp_path / "none/best.pt"}),
        "corrupt.pt is not a file of weights, or is damaged": ("evaluate", {"--checkpoint": tmp_path / "corrupt.pt"}),
        "foreign.pt is not a checkpoint of train.py": ("evaluate", {"--checkpoint": tmp_path / "foreign.pt"}),
        "finds no CUDA device on this machine": ("evaluate", {"--checkpoint": tmp_path / "foreign.pt", "--device": "cuda"}),
    }
    if torch.cuda.is_available():
        mistakes = {says: mistake for says, mistake in mistakes.items() if "CUDA" not in says}

    monkeypatch.chdir(tmp_path)
    for says, (program, changes) in mistakes.items():
        flags = {**(good if program == "train" else {}), **changes}
        arguments = [str(x) for pair in flags.items() if pair[1] is not None for x in pair]
        with pytest.raises(SystemExit) as ended:
            (train if program == "train" else evaluate).main(arguments)
        assert ended.value.code.startswith("error: ") and says in ended.value.code and "\n" not in ended.value.code, (says, ended.value.code)
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", *arguments], capture_output=True, text=True)  # and as a user sees the last of them
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == ended.value.code and "Traceback" not in done.stderr


def test_no_validation_clips_is_said_before_training(config, clips_folder, tmp_path):
    (tmp_path / "train.csv").write_text("".join(line for line in (clips_folder / "clips.csv").open() if not line.rstrip().endswith(("val", "test"))))
    with pytest.raises(DataError, match="no clip has split 'val'"):
        train.train(replace(config, annotations=tmp_path / "train.csv"))


# --------------------------------------------------------------------------------------------------------------- the real models


@pytest.mark.slow
@pytest.mark.parametrize("patch", [16])  # ViT-B/32 differs in the patch alone, and costs another 30 s
def test_vit_b_at_full_size_takes_a_step_and_is_evaluated(clips_folder, tmp_path, patch):
    """Random weights of ViT-B/16 in OpenAI's archive format: the path that the real ones take."""
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
