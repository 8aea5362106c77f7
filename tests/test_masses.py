"""The masses of the search: radii in units of the text, and masses on both sides."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import randn, random_model

from engine.masses import TwoMasses, inclusion, inclusion_loss
from engine.scoring import noise_bank, scores
from evaluate import scores_literal
from losses import cosine_scores
from model import RADII, XPool

TEXTS, VIDEOS, FRAMES, DIM = 5, 3, 4, 24
each = pytest.mark.parametrize("name", ["relative", "bounded"])


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return randn(TEXTS, DIM, seed=1), randn(VIDEOS, FRAMES, DIM, seed=2)


@each
@torch.no_grad()
def test_a_longer_text_has_a_larger_R_and_the_same_scores(name):
    text, frames = inputs()
    model, noise = random_model(radius=name, frames=FRAMES), noise_bank(20, DIM, 0)
    video = model.fusion(text, frames)
    R, longer = (model.radius(t, frames, video) for t in (text, 7 * text))
    torch.testing.assert_close(longer, 7 * R)
    torch.testing.assert_close(scores(model, text, frames, noise), scores_literal(model, text, frames, noise))
    found = scores(random_model(radius=name, fusion="mean", frames=FRAMES), text, frames, noise)
    again = scores(random_model(radius=name, fusion="mean", frames=FRAMES), 7 * text, frames, noise)
    torch.testing.assert_close(found, again)  # mean pooling does not read the text


@each
@torch.no_grad()
def test_initial_R_is_the_length_of_the_noise_next_to_the_text(name):
    text, frames = inputs()
    radius = RADII[name](FRAMES, DIM, initial=0.3)
    for parameter in [*radius.linear.parameters(), *(radius.out.parameters() if name == "bounded" else ())]:
        parameter.zero_()
    if name == "relative":
        radius.linear.bias.fill_(math.log(0.3))
    ratio = radius(text, frames, randn(TEXTS, VIDEOS, DIM)).norm(dim=-1) / text.norm(dim=-1)[:, None]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.3))


@torch.no_grad()
def test_channels_of_a_bounded_R_differ_by_a_factor_of_e_at_most():
    text, frames = inputs()
    radius = RADII["bounded"](FRAMES, DIM)
    for parameter in radius.parameters():
        parameter += 5 * torch.randn_like(parameter)
    R = radius(text, frames, randn(TEXTS, VIDEOS, DIM))
    factor = R.amax(-1) / R.amin(-1)
    assert 2 < factor.max() <= math.e * (1 + 1e-5)


def test_a_radius_in_units_of_the_text_needs_the_text():
    with pytest.raises(ValueError, match="needs t beside S"):
        RADII["relative"](FRAMES, DIM).from_similarities(torch.zeros(2, FRAMES))


@torch.no_grad()
def test_two_masses_score_half_the_expected_squared_distance_of_two_draws():
    text, frames = inputs()
    psi = random_model(fusion="two-masses", radius="none", frames=FRAMES).fusion
    for parameter in psi.added.parameters():
        parameter *= 0.2
    plain = XPool(DIM).eval()
    plain.load_state_dict({k: v for k, v in psi.state_dict().items() if not k.startswith("added.")})
    video, found = plain(text, frames), cosine_scores(text, psi(text, frames))
    means, (w_t, w_v) = F.normalize(frames, dim=-1).mean(dim=1), psi.added["out"].weight
    for i in range(TEXTS):
        for j in range(VIDEOS):
            t, m = (x / x.norm() * DIM**0.5 for x in (text[i], means[j]))
            variances = [
                TwoMasses.variance * math.exp(F.gelu(psi.added[part](x)) @ w)
                for part, x, w in (("text", t, w_t), ("video", m, w_v))
            ]
            a, b = (x / x.norm() for x in (text[i], video[i, j]))
            expected = (a - b).square().sum() + sum(variances)  # of two draws
            assert found[i, j] == pytest.approx(1 + TwoMasses.variance - expected.item() / 2, abs=1e-5)


def test_inclusion_equals_its_integrals():
    """Masses of one channel, against sums over a fine grid."""
    x = torch.linspace(-20, 20, 200_001, dtype=torch.float64)
    for mean, std, of, of_std in ((0.3, 1.7, -0.4, 0.6), (-1.0, 0.5, 1.0, 1.1), (0.0, 1.0, 0.2, 1.0)):
        q, p = (torch.distributions.Normal(m, s).log_prob(x).exp() for m, s in ((mean, std), (of, of_std)))
        expected = ((p * p * q).sum() / (p * q * q).sum()).log()
        found = inclusion(*(torch.tensor([value], dtype=torch.float64) for value in (mean, std, of, of_std)))
        assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_loss_of_inclusion_widens_the_general_caption_and_narrows_the_special_one():
    """Text 0 fits both videos, text 1 only its own: against the gradient, 0 comes to include 1."""
    video = torch.eye(2, DIM).expand(2, 2, DIM)
    text = torch.stack([(video[0, 0] + video[0, 1]) / 2**0.5, video[0, 1]])
    radius = torch.full((2, 2, DIM), 0.3).requires_grad_()
    loss = inclusion_loss(text=text, video=video, radius=radius, scale=10.0)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)  # equal masses include one another equally
    loss.backward()
    general, special = radius.grad[0, 0], radius.grad[1, 1]
    assert (general < 0).all() and (special > 0).all()
    assert not radius.grad[0, 1].any() and not radius.grad[1, 0].any()  # of matched pairs only
    wide, narrow = torch.full((2, 2, DIM), 0.3), torch.full((2, 2, DIM), 0.3)
    wide[0], narrow[0] = 0.9, 0.1
    losses = [inclusion_loss(text=text, video=video, radius=R, scale=10.0) for R in (wide, narrow)]
    assert losses[0] < loss < losses[1]
