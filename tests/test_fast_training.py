"""The fast form of a training step: the loss and gradients of the literal one, and where it is not used."""

import platform
from dataclasses import replace

import pytest
import torch
from conftest import random_model
from torch import nn

import train
from engine.config import Config, preset
from engine.controls import CONTROLS, VideoMoved
from engine.fast_training import dropout_mask, fast_symbols, pool
from losses import LOSSES
from model import LinearRadius, XPool

FRAMES, DIM = 4, 24
RECIPES = [
    ("none", "paper"), ("linear", "paper"), ("fixed", "paper"), ("scalar", "paper"), ("joint", "paper"),
    ("joint", "best"),
]  # fmt: skip


def config_of(radius: str, recipe: str, **options) -> Config:
    method = "xpool" if radius == "none" else "tmass"
    return replace(preset("shapes", method, recipe if method == "tmass" else None), radius=radius, **options)


def features(pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(pairs)
    text = torch.randn(pairs, DIM, generator=random)
    return text.requires_grad_(), torch.randn(pairs, FRAMES, DIM, generator=random).requires_grad_()


def loss_and_gradients(model, config, text, frames) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of train.forward, with respect to psi, R, the temperature and the features."""
    torch.manual_seed(3)  # of eps
    loss, parts = train.forward(model, text, frames, config)
    own = {name: p for name, p in model.named_parameters() if not name.startswith("clip.")}
    own |= {"scale": model.logit_scale, "text": text, "frames": frames}
    return torch.stack([loss, *parts.values()]), dict(zip(own, torch.autograd.grad(loss, list(own.values()))))


@pytest.mark.parametrize("pairs", [5, 17])  # W_o W_v is multiplied first where frames are many
@pytest.mark.parametrize(
    "fusion, radius, recipe",
    [*(("xpool", *each) for each in RECIPES), *((control, "none", "paper") for control in CONTROLS)],
)
def test_loss_and_all_gradients_are_those_of_the_literal_form(fusion, radius, recipe, pairs, monkeypatch):
    model = random_model(fusion=fusion, radius=radius, frames=FRAMES, dropout=0.0).train()
    config, (text, frames) = config_of(radius, recipe), features(pairs)
    assert fast_symbols(model, text, frames, config) is not None
    losses, gradients = loss_and_gradients(model, config, text, frames)
    monkeypatch.setattr(train, "fast_symbols", lambda *_: None)
    literal_losses, literal = loss_and_gradients(model, config, text, frames)
    assert torch.allclose(losses, literal_losses, rtol=1e-5)
    largest = max(g.norm() for g in literal.values())
    for name, g in literal.items():  # that of b_k is 0: the softmax does not see it
        assert (gradients[name] - g).norm() <= 1e-4 * g.norm() + 1e-6 * largest, name


class GivenMask(nn.Dropout):
    """A dropout with a mask that is known."""

    def __init__(self, keep: torch.Tensor, scale: float):
        super().__init__(0.3)
        self.keep, self.scale = keep, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.keep * self.scale


def test_dropout_with_the_same_mask_has_the_same_gradients():
    psi = random_model(fusion="xpool", radius="none", frames=FRAMES, dropout=0.3).train().fusion
    (text, frames), weight = features(7), torch.randn(7, 5, DIM)
    frames = frames[:5].detach().requires_grad_()
    torch.manual_seed(4)
    keep, scale = dropout_mask((7, 5, DIM), 0.3, text)
    torch.manual_seed(4)
    video, given = pool(psi, text, frames), [text, frames, *psi.parameters()]
    gradients = torch.autograd.grad((video * weight).sum(), given)
    psi.dropout = GivenMask(keep, scale)
    literal = psi(text, frames)
    assert 0.6 < keep.mean() < 0.8 and torch.allclose(video, literal, atol=1e-5)
    expected = torch.autograd.grad((literal * weight).sum(), given)
    largest = max(g.norm() for g in expected)
    assert all((g - e).norm() <= 1e-4 * e.norm() + 1e-6 * largest for g, e in zip(gradients, expected))


def test_the_mask_of_the_dropout_is_even_independent_and_seeded():
    shape, like = (50, 41, 101), torch.zeros(())
    torch.manual_seed(0)
    keep, scale = dropout_mask(shape, 0.3, like)
    n = keep.numel()
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert abs(keep.mean() - 0.7) < 4 * (0.3 * 0.7 / n) ** 0.5 and abs(scale * 0.7 - 1) < 1e-5
    lanes = keep.flatten()[: n // 4 * 4].view(-1, 4)  # the four numbers of one draw
    assert (lanes.mean(dim=0) - 0.7).abs().max() < 4 * (0.3 * 0.7 / len(lanes)) ** 0.5
    assert (torch.corrcoef(lanes.T) - torch.eye(4)).abs().max() < 4 / len(lanes) ** 0.5
    assert not torch.equal(keep, dropout_mask(shape, 0.3, like)[0])
    torch.manual_seed(0)
    assert torch.equal(keep, dropout_mask(shape, 0.3, like)[0])


class OwnPooling(XPool):
    """Another psi with the parameters of X-Pool."""

    def forward(self, text, frames):
        return -super().forward(text, frames)


class OwnControl(VideoMoved):
    """A control with its own forward."""

    def forward(self, text, frames):
        return -super().forward(text, frames)


class OwnRadius(LinearRadius):
    """Another R with the parameters of the linear one."""

    def exponent(self, sims, text, video):
        return -self.linear(sims)


@pytest.mark.parametrize(
    "case",
    ["psi", "a control's child", "a control with R", "heads", "R", "pairs", "prior", "loss", "inclusion"],
)
def test_what_it_does_not_know_is_left_to_the_literal_form(case, monkeypatch):
    heads = 2 if case == "heads" else 1
    model = random_model(fusion="xpool", radius="linear", frames=FRAMES, dropout=0.0, heads=heads).train()
    config, (text, frames) = config_of("linear", "paper"), features(6)
    others = {"psi": OwnPooling, "a control's child": OwnControl, "a control with R": VideoMoved}
    if case in others:
        model.fusion = others[case](DIM)
        model.radius = model.radius if case.endswith("R") else None
    if case == "R":
        model.radius = OwnRadius(FRAMES, DIM)
    if case == "pairs":
        config = replace(config, pairs="every")
    if case == "prior":
        model.radius = random_model(radius="joint", frames=FRAMES).radius
        config = config_of("joint", "best", prior="uniform")
    if case == "inclusion":
        config = replace(config, inclusion=0.1)
    if case == "loss":
        monkeypatch.setitem(LOSSES, "L_ce", lambda radius, **_: radius.mean())
    assert fast_symbols(model, text, frames, config) is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other systems free memory in another way")
def test_new_tensors_take_the_memory_of_freed_ones():
    """Without page faults: a tensor of 4 MiB has 1,024 pages."""
    import resource

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def some() -> None:
        for _ in range(10):
            _ = [torch.zeros(2**20) for _ in range(8)]

    some()
    before = faults()
    some()
    assert faults() - before < 5 * 1024
