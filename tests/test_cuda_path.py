"""What a CPU can prove of the path to a GPU. With a GPU at hand the same tests run on it too.

Precision, compiled graphs, memory layouts, an allocator at its limit, workers, tensors of another device.
"""

import contextlib
import functools
import logging
import multiprocessing

import pytest
import torch
from conftest import randn, small_clip
from test_train import gradients
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import train
from data import ClipDataset
from engine import optim
from engine.config import RECIPES, Config
from engine.frames import FrameCache
from engine.optim import TrainState, compile_encoders, train_mode
from engine.scoring import Delta, best_of, noise_bank, scores
from model import TMASS

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
DEVICES = ["cpu", pytest.param("cuda", marks=no_gpu)]
SIZES = dict(num_frames=3, clip_lr=1e-3, head_lr=1e-3, augment=False, compile="off")


class Steps:
    """Steps of a small model on random pairs, always the same on every device; noise and dropout are off."""

    def __init__(self, device: str = "cpu", trunk: str = "vit", layout=torch.contiguous_format, **options):
        self.config = config = Config(**{**SIZES, "prior_std": 0.0, **options})
        torch.manual_seed(1)
        model = TMASS(small_clip(trunk), config.fusion, config.radius, config.num_frames, dropout=0.0)
        self.model = model.to(memory_format=layout).to(device)
        train_mode(model, config)
        compile_encoders(model, config.compile)
        self.state, self.encoder = TrainState(model, config, total=100), train.Encoder(model, config)

    def take(self, pairs: int = 7, times: int = 1) -> torch.Tensor:
        """Takes steps on a batch, and returns the last loss."""
        random, device = torch.Generator().manual_seed(pairs), self.model.logit_scale.device
        shape = (pairs, self.config.num_frames, 3, 32, 32)
        images = torch.randint(0, 255, shape, dtype=torch.uint8, generator=random).to(device)
        tokens = torch.randint(1, 49000, (pairs, 20), generator=random).to(device)
        for _ in range(times):
            loss, _ = train.train_step(self.state, self.encoder, images, tokens, self.config, pairs)
        return loss

    @property
    def gradient(self) -> torch.Tensor:
        return gradients(self.state).cpu()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


# ------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("amp, half", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_clip_multiplies_in_half_precision_also_when_recomputed_and_psi_and_R_in_float32(device, amp, half):
    steps = Steps(device, amp=amp, micro_batch=3)
    seen: dict[str, list[torch.dtype]] = {}
    layers = {
        "phi_v": steps.model.clip.visual.transformer.resblocks[0].mlp.c_fc,
        "R": steps.model.radius.linear,
    }
    layers |= {"phi_t": steps.model.clip.transformer.resblocks[0].mlp.c_fc, "psi": steps.model.fusion.linear}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *call, name=name: seen.setdefault(name, []).append(call[-1].dtype))
    loss = steps.take(7)
    assert seen["phi_v"] == seen["phi_t"] == [half] * 6  # three micro-batches, twice
    assert seen["psi"] == seen["R"] == [torch.float32] and loss.dtype == torch.float32
    assert {parameter.grad.dtype for parameter in steps.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("amp, tolerance", [("bf16", 0.05), ("fp16", 0.01)])
def test_gradients_of_half_precision_are_those_of_float32_whatever_the_micro_batch(
    device, amp, tolerance, monkeypatch
):
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(GradScaler, init_scale=2.0**10))
    exact, half, micro = Steps(), Steps(device, amp=amp), Steps(device, amp=amp, micro_batch=3)
    losses = [steps.take().item() for steps in (exact, half, micro)]
    assert losses == pytest.approx([losses[0]] * 3, rel=tolerance)
    assert 0 < apart(half.gradient, exact.gradient) < tolerance
    assert apart(micro.gradient, half.gradient) < tolerance / 2


@pytest.mark.parametrize("device", DEVICES)
def test_the_loss_scale_changes_neither_the_gradient_nor_its_clipping(device, monkeypatch):
    """Clipping comes after the scale is taken out: a gradient that is clipped has norm 1."""
    found = []
    for scale in (2.0**2, 2.0**12):
        monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(GradScaler, init_scale=scale))
        steps = Steps(device, amp="fp16")
        assert steps.state.scaler.get_scale() == scale
        steps.take()
        assert steps.state.guard.read()[0] == 0
        found.append(steps.gradient)
    assert apart(*found) < 0.01 and found[0].norm() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_an_overflow_halves_the_loss_scale_until_steps_are_taken(device, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(GradScaler, init_scale=2.0**26))
    steps = Steps(device, amp="fp16")
    start = steps.model.fusion.linear.weight.detach().clone()
    while steps.take().isfinite() and steps.state.guard.counts[1]:  # the last step was skipped
        assert torch.equal(steps.model.fusion.linear.weight, start) and steps.state.step < 26
    skipped, taken = steps.state.guard.read()[0], steps.state.step
    assert 0 < skipped == taken - 1 and steps.state.scaler.get_scale() == 2.0 ** (26 - skipped)
    assert not torch.equal(steps.model.fusion.linear.weight, start)


# ------------------------------------------------------------------------------------------- compiled graphs


def test_uneven_micro_batches_and_validation_compile_once_and_change_nothing(monkeypatch):
    """Micro-batches of 3, 3 and 2, then 5 clips without gradient: the first round's graphs serve the second.

    phi_v is captured as on a GPU, under autocast and with its recomputation, and run by torch itself."""
    captured, counts, compiled = [], [], torch.nn.Module.compile

    def backend(graph, inputs):
        captured.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def compile_vision(module):
        if hasattr(module, "conv1"):
            compiled(module, backend=backend, fullgraph=True)

    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", compile_vision)
    monkeypatch.setattr(
        logging.getLogger("torch.__trace"), "disabled", True
    )  # pytest's handlers slow it down
    eager, other = Steps(amp="bf16", micro_batch=3), Steps(amp="bf16", micro_batch=3, compile="on")
    for steps in (eager, other):
        steps.model.clip.visual.transformer.resblocks = steps.model.clip.visual.transformer.resblocks[:1]
    images = torch.rand(5, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        losses = [steps.take(8).item() for steps in (eager, other)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
        assert apart(other.gradient, eager.gradient) < 0.02
        with torch.no_grad():
            features = [steps.model.eval().encode_frames(images) for steps in (eager, other)]
        assert apart(*features) < 0.01
        for steps in (eager, other):
            train_mode(steps.model, steps.config)
        counts.append(len(captured))
    assert 0 < counts[0] == counts[1] <= 4
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------------- memory layouts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trunk", ["vit", "resnet"])
def test_weights_laid_out_by_channel_take_the_same_steps(device, trunk):
    """cuDNN prefers this layout. The moments have the strides of their weights, and AdamW pairs them."""
    one = Steps(device, trunk)
    other = Steps(device, trunk, layout=torch.channels_last)
    strided = [p for p in other.model.parameters() if not p.is_contiguous()]
    assert len(strided) > (trunk == "resnet") * 5
    assert torch.allclose(one.take(times=3), other.take(times=3), rtol=1e-4)
    for parameter in strided:
        assert other.state.optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert (mine - theirs).abs().max() < 1e-4, mine.shape  # three steps of up to 1e-3


def test_a_gradient_laid_out_otherwise_than_its_weight_moves_the_right_channels():
    """torch.compile may return such a gradient, and fused AdamW reads memory in its order."""
    weight = torch.nn.Parameter(randn(4, 3, 5, 2))
    gradient = randn(4, 3, 5, 2, seed=1)
    (weight * gradient.contiguous(memory_format=torch.channels_last)).sum().backward()
    same = torch.nn.Parameter(weight.detach().clone())
    same.grad = gradient.clone()
    for parameter in (weight, same):
        torch.optim.AdamW([parameter], fused=True).step()
    assert torch.equal(weight, same)


# ------------------------------------------------------------------------------------------------- workers


def no_gpu_here(*_) -> None:
    raise AssertionError("a worker must not touch the GPU")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_forked_and_spawned_workers_load_the_same_batches_without_the_gpu(
    clips, tmp_path, method, monkeypatch
):
    """A forked worker cannot use a GPU that its parent uses; a spawned one gets the data set as bytes."""
    dataset = ClipDataset(clips, FrameCache(tmp_path, 3, 32), 20, augmentation=(0, 1))
    order = [[(2, 0), (0, 1)], [(1, 0)], [(3, 1), (4, 0), (2, 1)]]
    expected = list(data.batches(dataset, order))
    context = multiprocessing.get_context(method)
    loader = functools.partial(torch.utils.data.DataLoader, multiprocessing_context=context)
    monkeypatch.setattr(torch.utils.data, "DataLoader", loader)
    monkeypatch.setattr(torch.cuda, "_lazy_init", no_gpu_here)  # reaches a forked worker
    found = list(data.batches(dataset, order, workers=1))
    assert len(found) == 3
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(a, b) and b.device.type == "cpu" for a, b in zip(one, other, strict=True))


# ----------------------------------------------------------------------------- a device that is not the CPU


class OneDevice(TorchDispatchMode):
    """Fails where tensors of two devices meet, or one is copied from the CPU. A value that is read is 0."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        read = function is torch.ops.aten._local_scalar_dense.default
        if read and arguments[0].device.type == "meta":
            return 0
        out = function(*arguments, **(keywords or {}))
        found = [
            x for x in tree_leaves((arguments, keywords, out)) if isinstance(x, torch.Tensor) and x.dim()
        ]
        assert len({x.device.type for x in found}) < 2, function
        return out


class NotFused(torch.optim.AdamW):
    """AdamW by single operations, which do not know `found_inf`."""

    def __init__(self, *groups, fused: bool, **more):
        super().__init__(*groups, **more)

    def step(self, *arguments):
        self.found_inf = None
        return super().step(*arguments)


@pytest.mark.parametrize("options", [
    dict(), RECIPES["best"], dict(pairs="every", prior="uniform", micro_batch=3), dict(radius="none"),
])  # fmt: skip
def test_a_step_and_its_scores_stay_on_their_device(options, monkeypatch):
    """On torch's device without memory (meta), which no tensor of the CPU may meet. AdamW is not fused."""
    monkeypatch.setattr(train, "autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(optim, "READS_FOUND_INF", ("meta",))
    monkeypatch.setattr(torch.optim, "AdamW", NotFused)
    steps = Steps(**{**options, "prior_std": 1.0})
    model = steps.model.to("meta")
    for block in model.clip.transformer.resblocks:
        block.attn_mask = block.attn_mask.to("meta")
    steps.state = TrainState(model, steps.config, total=10)
    images = torch.empty(7, 3, 3, 32, 32, dtype=torch.uint8, device="meta")
    tokens = torch.ones(7, 20, dtype=torch.long, device="meta")
    train.normalise(images), best_of(20)  # keep their constants
    bank = noise_bank(20, 24, 0).to("meta")
    with OneDevice():
        for _ in range(2):
            loss, parts = train.train_step(steps.state, steps.encoder, images, tokens, steps.config, 7)
        text, frames = torch.empty(5, 24, device="meta"), torch.empty(4, 3, 24, device="meta")
        for noise in (bank, Delta(20)):
            assert scores(model.eval(), text, frames, noise).shape == (5, 4)
    assert {loss.device.type, *(part.device.type for part in parts.values())} == {"meta"}
    assert all(parameter.grad.device.type == "meta" for parameter in model.parameters())


@no_gpu
@pytest.mark.parametrize("options", [dict(), dict(micro_batch=3), RECIPES["best"]])
def test_a_step_on_the_gpu_is_that_of_the_cpu(options):
    one, other = Steps(**options, amp="off"), Steps("cuda", **options, amp="off")
    assert one.take().item() == pytest.approx(other.take().item(), rel=1e-3)
    assert apart(other.gradient, one.gradient) < 1e-2
