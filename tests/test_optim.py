"""The optimizer: its schedule and groups, BatchNorm, compilation, and the guard against non-finite steps."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import randn, small_clip
from test_train import a_step, csv_config, gradients
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train
from engine import optim
from engine.config import METHODS, RECIPES, Config
from engine.experiment import read_log
from engine.files import ModelError
from engine.optim import TrainState, compile_encoders, finite, learning_rate, parameter_groups, train_mode
from engine.scoring import Delta, best_of, noise_bank, scores
from model import TMASS


@pytest.fixture
def config(clips_folder, weights, tmp_path) -> Config:
    return csv_config(clips_folder, weights, tmp_path)


def test_learning_rate_rises_to_one_and_falls_to_zero():
    rates = [learning_rate(step, 100, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)]) and max(rates) == 1
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[55] == pytest.approx(0.5, abs=0.01) and rates[100] == pytest.approx(0)


def test_clip_psi_and_R_have_learning_rates_of_their_own():
    model = TMASS(small_clip(), radius="joint")
    model.clip.visual.requires_grad_(False)
    groups = parameter_groups(model, Config(clip_lr=1.0, head_lr=2.0, radius_lr=3.0))
    assert [group["lr"] for group in groups] == [1, 2, 3]
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    frozen = sum(p.numel() for p in model.clip.visual.parameters())
    parts = [sum(p.numel() for p in part.parameters()) for part in (model.clip, model.fusion, model.radius)]
    assert sizes == [parts[0] - frozen, *parts[1:]]
    assert [group["lr"] for group in parameter_groups(model, Config(clip_lr=1.0, head_lr=2.0))] == [1, 2, 2]
    assert parameter_groups(TMASS(small_clip(), radius="none"), Config())[2]["params"] == []


@pytest.mark.parametrize("method", METHODS)
def test_batch_norm_learns_only_with_method_clip(method):
    model = TMASS(small_clip(), *METHODS[method])
    train_mode(model, Config(method=method))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert model.training and model.fusion.training and len(norms) > 3
    assert {norm.training for norm in norms} == {method == "clip"}


def test_numbers_for_json_are_finite():
    assert [finite(torch.tensor(x)) for x in (0.5, torch.nan, -torch.inf)] == [0.5, None, None]


def test_state_comes_back_and_a_foreign_one_gives_one_sentence():
    one, _ = a_step(steps=3)
    one.best, one.val, one.validated = 12.0, {"t2v": {}}, 2
    saved = {"model": one.model.state_dict(), **one.state_dict()}
    other = TrainState(TMASS(small_clip("vit"), num_frames=3), Config(num_frames=3), total=10)
    other.load(saved)
    assert (other.step, other.best, other.val, other.validated) == (3, 12.0, {"t2v": {}}, 2)
    assert str(other.state_dict()) == str(one.state_dict())
    spoilt = [{name: x for name, x in saved.items() if name != "guard"}, saved | {"optimizer": 3}]
    spoilt += [saved | {name: value} for name in ("model", "guard", "step", "val") for value in ([], "3")]
    for content in spoilt:
        with pytest.raises(
            ModelError, match=r"last\.pt does not fit this model \(.*\): another version wrote it"
        ):
            other.load(content)


@pytest.mark.parametrize("of_state, of_model", [
    (torch.channels_last, torch.contiguous_format), (torch.contiguous_format, torch.channels_last),
])  # fmt: skip
def test_a_state_of_another_device_continues_with_the_strides_of_this_one(of_state, of_model):
    """AdamW's moments of a convolution that is laid out in another way, as those of a GPU on a CPU."""
    one, _ = a_step(trunk="resnet", steps=2)
    saved = copy.deepcopy({"model": one.model.state_dict(), **one.state_dict()})
    for moments in saved["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].dim() == 4:
                moments[name] = moments[name].contiguous(memory_format=of_state)
    other = TrainState(TMASS(small_clip("resnet"), num_frames=3), Config(num_frames=3), total=10)
    other.model.to(memory_format=of_model)
    other.load(saved)
    for state in (one, other):
        for number, parameter in enumerate(state.model.parameters()):
            parameter.grad = torch.zeros_like(parameter).copy_(randn(*parameter.shape, seed=number))
        state.optimizer.step()
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-7)


def test_a_state_of_a_clip_with_another_activation_is_refused():
    state, _ = a_step()
    saved = {"model": state.model.state_dict(), "arguments": {"activation": "gelu"}, **state.state_dict()}
    with pytest.raises(ModelError, match=r"last\.pt does not fit .*its activation is gelu, not quick_gelu"):
        state.load(saved)


# ---------------------------------------------------------------------------------------------- compilation


def test_compiled_encoders_keep_the_names_of_checkpoints():
    model = TMASS(small_clip("vit"))
    names = list(model.state_dict())
    compile_encoders(model, "auto")
    assert model.clip.visual._compiled_call_impl is None  # "auto" does nothing on the CPU
    compile_encoders(model, "on")
    assert model.clip.visual._compiled_call_impl and model.clip.transformer._compiled_call_impl
    assert list(model.state_dict()) == names


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """As a GPU machine with triton: a C compiler that does what tmp_path/gcc says, and Python.h."""
    for name, content in {"gcc": "#!/bin/sh\ncat > /dev/null\n", "Python.h": ""}.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CC", str(tmp_path / "gcc"))
    monkeypatch.setattr(optim, "find_spec", lambda name: name)
    monkeypatch.setattr(optim.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


class OnCuda(TMASS):
    """A model that says that it is on a GPU."""

    logit_scale = SimpleNamespace(is_cuda=True)


def test_compile_auto_compiles_where_triton_finds_all_that_it_needs(tools, monkeypatch, capsys):
    def says() -> str:
        model = OnCuda(small_clip("vit"))
        compile_encoders(model, "auto")
        line = capsys.readouterr().out
        assert (line == "") == (model.clip.visual._compiled_call_impl is not None) and line.count("\n") < 2
        return line.removeprefix("CLIP is not compiled: ").partition(". Training is slower")[0]

    assert says() == ""
    (tools / "gcc").write_text("#!/bin/sh\ncat > /dev/null\necho 'a.h:1: fatal error: no b.h' >&2\nexit 1\n")
    assert says() == f"{tools}/gcc fails (a.h:1: fatal error: no b.h)"
    (tools / "Python.h").unlink()
    assert says() == f"triton needs Python.h, and {tools} has none (package python3-dev or python-devel)"
    monkeypatch.setenv("CC", "no-such-cc")
    assert says() == "triton needs a C compiler, and no-such-cc is not found"
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert says() == "triton needs a C compiler, and gcc or clang is not found"
    monkeypatch.setattr(optim, "find_spec", lambda name: None)
    assert says() == "the package triton is not installed"


@pytest.mark.parametrize(
    "options",
    [dict(micro_batch=3), dict(trunk="resnet", amp="bf16")],
    ids=["vit, micro-batches", "resnet, bf16"],
)
def test_compiled_encoders_give_loss_and_gradients_of_eager_ones(monkeypatch, options):
    """The graph is captured without a break, and run by torch itself: generating code takes a minute."""
    eager, loss = a_step(**options)
    normal, compiled = nn.Module.compile, []

    def whole_graph(module):
        compiled.append(normal(module, backend="aot_eager", fullgraph=True))

    monkeypatch.setattr(nn.Module, "compile", whole_graph)
    other, same_loss = a_step(compile="on", **options)
    assert len(compiled) == 2 and torch.allclose(loss, same_loss, rtol=1e-5)
    assert (gradients(eager) - gradients(other)).norm() < 1e-5 * gradients(eager).norm()


# ------------------------------------------------------------------------------------------ non-finite steps


@pytest.mark.parametrize(
    "options",
    [dict(), dict(amp="fp16"), dict(method="clip", trunk="resnet")],
    ids=["off", "fp16", "batch norm"],
)
@pytest.mark.parametrize("what", ["loss", "only loss", "gradient", "features"])
def test_step_that_is_not_finite_is_skipped_and_counted(monkeypatch, options, what):
    """Weights, statistics and AdamW's moments stay. The schedule goes on, and the next step is normal."""
    normal, calls = train.forward, []

    def broken(model, text, frames, config):
        calls.append(1)
        spoil = torch.full_like(text, torch.nan if what == "features" and len(calls) == 6 else 1.0)
        loss, parts = normal(model, text * spoil, frames, config)
        if what != "features" and len(calls) == 6:
            # "only loss" has a finite gradient; "gradient" is a finite loss whose gradient is not.
            spoilt = {"loss": loss * torch.inf, "only loss": loss + torch.inf}
            loss = {**spoilt, "gradient": loss + (0 * text.sum()).sqrt()}[what]
        return loss, parts

    monkeypatch.setattr(train, "forward", broken)
    trunk = options.get("trunk", "vit")
    if trunk == "resnet" and what == "features":  # in the forward pass, so that BatchNorm sees it too
        images_of = train.normalise
        monkeypatch.setattr(
            train, "normalise", lambda images: images_of(images) * (torch.nan if len(calls) == 5 else 1)
        )
    # The first three steps of fp16 find its scale.
    before, bad, after = (a_step(steps=steps, **options)[0] for steps in (5, 6, 7) if not calls.clear())
    assert bad.guard.read() == (1 + before.guard.read()[0], None)
    assert bad.step == 6 and before.guard.counts[1] == 0
    values = zip(before.model.state_dict().values(), bad.model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in values)
    moments = [state.optimizer.state_dict()["state"] for state in (before, bad)]
    assert all(
        torch.equal(moments[0][k][name], moments[1][k][name]) for k in moments[0] for name in moments[0][k]
    )
    assert bad.schedule.get_last_lr() != before.schedule.get_last_lr()
    assert after.guard.read()[0] == bad.guard.read()[0]
    assert all(value.isfinite().all() for value in after.model.state_dict().values())
    assert not torch.equal(after.model.logit_scale, bad.model.logit_scale)
    if options.get("amp") == "fp16":
        assert bad.scaler.get_scale() == before.scaler.get_scale() / 2


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_step_is_skipped_where_adamw_does_not_read_found_inf(monkeypatch, amp):
    """As on MPS. Simulated on the CPU: AdamW loses what was set."""
    monkeypatch.setattr(optim, "READS_FOUND_INF", ())
    normal, take_step, calls = train.forward, torch.optim.AdamW.step, []

    def broken(*arguments):
        calls.append(1)
        loss, parts = normal(*arguments)
        return loss * (torch.nan if len(calls) == 6 else 1), parts

    def blind(optimizer, *arguments):
        optimizer.found_inf = None
        return take_step(optimizer, *arguments)

    monkeypatch.setattr(train, "forward", broken)
    monkeypatch.setattr(torch.optim.AdamW, "step", blind)
    before, bad, after = (a_step(steps=steps, amp=amp)[0] for steps in (5, 6, 7) if not calls.clear())
    values = zip(before.model.state_dict().values(), bad.model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in values)
    assert str(before.optimizer.state_dict()["state"]) == str(bad.optimizer.state_dict()["state"])
    assert bad.guard.read()[0] == 1 + before.guard.read()[0] and bad.step == 6
    assert not torch.equal(after.model.logit_scale, bad.model.logit_scale)


class NoFloat64(TorchDispatchMode):
    """Fails where a tensor of float64 is computed, which MPS does not have."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, function
        return out


@pytest.mark.parametrize("options", [dict(), RECIPES["best"], dict(pairs="every", prior="uniform")])
def test_a_step_and_scores_need_no_float64(options):
    best_of(20)  # once, on the CPU
    with NoFloat64():
        state, _ = a_step(**options)
        text, frames = randn(5, 24), randn(4, 3, 24)
        for noise in (noise_bank(20, 24, 0), Delta(20)):
            scores(state.model.eval(), text, frames, noise)


def test_many_such_steps_in_a_row_end_training_with_the_clips(config, monkeypatch):
    normal, calls = train.tmass_loss, []

    def broken(*arguments, **symbols):
        calls.append(1)
        loss, parts = normal(*arguments, **symbols)
        return loss * (torch.nan if 5 <= len(calls) < 15 else 1), parts

    monkeypatch.setattr(train, "tmass_loss", broken)
    says = "10 steps in a row had a loss or gradient that is not finite, the last of them step 14, with"
    with pytest.raises(ModelError, match=says) as error:
        train.train(replace(config, epochs=3))
    clips, _ = train.read_data(config)
    order = train.epoch_batches(clips, 8, 0, 1)[3]  # step 14: the fourth of the second epoch
    assert (
        all(clips[clip].id in str(error.value) for clip, _ in order) and str(error.value).count(".mp4") == 8
    )
    rows = [(row["step"], row["skipped"]) for row in read_log(config.out) if "loss" in row]
    assert rows == [(10, 6), (20, 10)]
