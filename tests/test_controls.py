"""The controls of the text mass: X-Pool with a layer that changes the score and is no mass."""

import pytest
import torch
import torch.nn.functional as F
from conftest import randn, random_model

from engine.config import preset
from engine.controls import CONTROLS, Control, dispersion, with_cosine
from engine.optim import parameter_groups
from engine.scoring import _Task, scores
from evaluate import scores_literal
from losses import cosine_scores
from model import FUSIONS, JointRadius, XPool

TEXTS, VIDEOS, FRAMES, DIM = 5, 3, 4, 24
each = pytest.mark.parametrize("name", CONTROLS)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return randn(TEXTS, DIM, seed=1), randn(VIDEOS, FRAMES, DIM, seed=2)


def control(name: str) -> Control:
    """A control of random parameters; its layer is small, so that scores lie within -1 and 1."""
    psi = random_model(fusion=name, radius="none", frames=FRAMES).fusion
    for parameter in psi.added.parameters():
        parameter.data *= 0.2
    return psi


def as_xpool(psi: Control) -> XPool:
    """X-Pool with the same weights."""
    plain = XPool(DIM).eval()
    plain.load_state_dict({k: v for k, v in psi.state_dict().items() if not k.startswith("added.")})
    return plain


def hidden(psi: Control, text: torch.Tensor, video: torch.Tensor, of_video: bool = True) -> torch.Tensor:
    """gelu(W_t t' + W_v v'), one pair at a time."""
    out = torch.empty(TEXTS, VIDEOS, DIM)
    for i in range(TEXTS):
        for j in range(VIDEOS):
            t, v = (x / x.norm() * DIM**0.5 for x in (text[i], video[i, j]))
            both = psi.added["text"](t) + (psi.added["video"](v) if of_video else 0)
            out[i, j] = F.gelu(both)
    return out


@each
def test_a_control_starts_as_xpool(name):
    text, frames = inputs()
    psi = FUSIONS[name](DIM).eval()
    for parameter in [psi.added["out"].weight] if "out" in psi.added else []:
        parameter.data.zero_()
    found, expected = (cosine_scores(text, fusion(text, frames)) for fusion in (psi, as_xpool(psi)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", [1, 6, None])
@pytest.mark.parametrize("name", [*CONTROLS, "two-masses"])
@torch.no_grad()
def test_a_control_has_a_fast_form_that_is_the_literal_one(name, block, monkeypatch):
    text, frames = inputs()
    model = random_model(fusion=name, radius="none", frames=FRAMES)
    for parameter in model.fusion.added.parameters():
        parameter *= 0.2
    expected = scores_literal(model, text, frames, torch.zeros(0, DIM))
    monkeypatch.setattr(_Task, "literal", None)  # the slow form is not used
    found = scores(model, text, frames, torch.zeros(0, DIM), block=block)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@each
@torch.no_grad()
def test_the_score_of_a_control_is_its_equation(name):
    text, frames = inputs()
    psi = control(name)
    video = as_xpool(psi)(text, frames)
    cosine, h = cosine_scores(text, video), None
    if name != "dispersion":
        h = psi.added["out"](hidden(psi, text, video, of_video=name != "text-number"))
    expected = {
        "video-moved": lambda: cosine_scores(text, video + h),
        "text-moved": lambda: cosine_scores(
            text[:, None] + text.norm(dim=1)[:, None, None] * h / DIM**0.5, video
        ),
        "number": lambda: cosine + h[..., 0],
        "text-number": lambda: cosine + h[..., 0],
        "dispersion": lambda: cosine - psi.added["weight"] * dispersion(frames),
    }[name]()
    assert (expected - cosine).abs().max() > 1e-3
    torch.testing.assert_close(cosine_scores(text, psi(text, frames)), expected, atol=1e-5, rtol=0)


def test_a_number_of_the_text_alone_changes_no_ranking_of_videos():
    text, frames = inputs()
    psi = control("text-number")
    found, plain = (cosine_scores(text, fusion(text, frames)) for fusion in (psi, as_xpool(psi)))
    shift = found - plain
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), atol=1e-5, rtol=0)
    assert shift[:, 0].std() > 1e-3


def test_a_video_gets_the_cosine_that_is_asked_for_and_its_gradient():
    text, video = inputs()[0], randn(TEXTS, VIDEOS, DIM, seed=3)
    asked = torch.linspace(-0.95, 0.95, TEXTS * VIDEOS).view(TEXTS, VIDEOS).requires_grad_()
    found = cosine_scores(text, with_cosine(text, video, asked))
    torch.testing.assert_close(found, asked, atol=1e-5, rtol=0)
    weights = randn(TEXTS, VIDEOS, seed=4)
    (gradient,) = torch.autograd.grad((found * weights).sum(), asked)
    torch.testing.assert_close(gradient, weights, atol=1e-3, rtol=1e-3)


def test_dispersion_is_0_for_equal_frames_and_1_for_opposite_ones():
    frame = randn(DIM)
    frames = torch.stack([frame.expand(FRAMES, DIM), torch.stack([frame, -2 * frame, 3 * frame, -frame])])
    torch.testing.assert_close(dispersion(frames), torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)


@each
def test_the_layer_of_a_control_is_trained_at_the_rate_of_R(name):
    model = random_model(fusion=name, radius="none")
    config = preset("csv", "tmass")
    _, psi, radius = parameter_groups(model, config)
    assert {id(p) for p in radius["params"]} == {id(p) for p in model.fusion.added.parameters()}
    assert len(psi["params"]) + len(radius["params"]) == len([*model.fusion.parameters()])


def test_a_moved_video_has_the_parameters_that_R_of_t_and_v_adds():
    joint, added = JointRadius(FRAMES, DIM), FUSIONS["video-moved"](DIM).added
    count = sum(p.numel() for p in joint.parameters()) - sum(p.numel() for p in joint.linear.parameters())
    assert sum(p.numel() for p in added.parameters()) == count
