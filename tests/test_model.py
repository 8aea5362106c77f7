"""psi, R, the text mass and TMASS equal their equations."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, randn, random_model, small_clip
from torch.nn.functional import cosine_similarity, layer_norm

import model
from model import (
    FUSIONS,
    RADII,
    TMASS,
    JointRadius,
    LinearRadius,
    MeanPool,
    XPool,
    cosine_similarities,
    matched,
    sample_noise,
    stochastic_text,
    support_text,
)

M, TEXTS, VIDEOS, FRAMES, DIM = 6, 5, 3, 4, 8


def random_(module: torch.nn.Module) -> torch.nn.Module:
    for k, parameter in enumerate(module.parameters()):
        parameter.data += 0.5 * randn(*parameter.shape, seed=k)
    return module.eval()


text, frames = randn(TEXTS, DIM), randn(VIDEOS, FRAMES, DIM, seed=1)


# ------------------------------------------------------------------------------------------------- psi


@pytest.mark.parametrize("heads", [1, 2])
def test_xpool_equals_its_equations_pair_by_pair(heads):
    psi, size = random_(XPool(DIM, heads)), DIM // heads

    def norm(layer, x):
        return layer_norm(x, (DIM,), layer.weight, layer.bias)

    for i in range(TEXTS):
        for j in range(VIDEOS):
            t, f = norm(psi.norm1, text[i]), norm(psi.norm1, frames[j])
            q, k, u = psi.query(t), psi.key(f), psi.value(f)
            pooled = []
            for part in (slice(h * size, (h + 1) * size) for h in range(heads)):
                a = (k[:, part] @ q[part] / math.sqrt(size)).softmax(0)
                pooled.append(sum(a[f] * u[f, part] for f in range(FRAMES)))
            o = norm(psi.norm2, psi.out(torch.cat(pooled)))
            v = norm(psi.norm3, o + psi.linear(o))
            assert torch.allclose(psi(text, frames)[i, j], v, atol=1e-5)


@pytest.mark.parametrize("psi", [MeanPool(), random_(XPool(DIM, 2))], ids=["mean", "xpool"])
def test_video_of_a_pair_depends_on_that_pair_alone(psi):
    video = psi(text, frames)
    assert torch.allclose(psi(text[2:4], frames[1:2]), video[2:4, 1:2], atol=1e-6)
    edited = psi(text + torch.eye(TEXTS)[1][:, None] * randn(DIM), frames)
    changed = (edited - video).abs().amax(dim=(1, 2)) > 1e-4
    assert changed.tolist() == [False, isinstance(psi, XPool), False, False, False]


def test_attention_sums_to_one_and_prefers_the_more_similar_frame():
    psi = XPool(DIM, 2)
    assert torch.allclose(psi.attention(text, frames).sum(-1), torch.ones(TEXTS, VIDEOS, 2))
    frame_like_text = torch.stack([text[0], -text[0]])[None]
    assert (
        psi.attention(text[:1], frame_like_text)[0, 0, :, 0].min() > 0.5
    )  # at its start, psi attends by similarity


def test_xpool_does_not_see_the_order_of_frames_and_mean_pool_neither():
    for psi in (MeanPool(), random_(XPool(DIM))):
        assert torch.allclose(psi(text, frames.flip(1)), psi(text, frames), atol=1e-6)


def test_mean_pool_is_the_mean_of_unit_frames():
    expected = torch.stack([frame / frame.norm() for frame in frames[1]]).mean(0)
    assert torch.allclose(MeanPool()(text, frames)[3, 1], expected, atol=1e-6)


def test_dropout_acts_in_training_only():
    psi = XPool(DIM, dropout=0.5)
    assert not torch.equal(psi.train()(text, frames), psi(text, frames))
    assert torch.equal(psi.eval()(text, frames), psi(text, frames))


# --------------------------------------------------------------------------------------- the text mass


@pytest.mark.parametrize("kind", ["fixed", "scalar", "linear"])
def test_radius_equals_its_equation_pair_by_pair(kind):
    R = random_(RADII[kind](FRAMES, DIM, initial=0.3))
    for i in range(TEXTS):
        for j in range(VIDEOS):
            S = torch.stack([cosine_similarity(text[i], frames[j, k], dim=0) for k in range(FRAMES)])
            if kind == "linear":
                exponent = R.linear.weight @ S + R.linear.bias
            else:
                exponent = S.mean() * (R.theta if kind == "scalar" else 1)
            assert torch.allclose(R(text, frames)[i, j], exponent.exp().expand(DIM), atol=1e-5)


def test_joint_radius_equals_its_equation_pair_by_pair():
    R, v = random_(JointRadius(FRAMES, DIM, initial=0.3)), randn(TEXTS, VIDEOS, DIM, seed=5)
    for i in range(TEXTS):
        for j in range(VIDEOS):
            S = torch.stack([cosine_similarity(text[i], frames[j, k], dim=0) for k in range(FRAMES)])
            t_, v_ = (x / x.norm() * DIM**0.5 for x in (text[i], v[i, j]))
            hidden = torch.nn.functional.gelu(R.text.weight @ t_ + R.text.bias + R.video.weight @ v_)
            exponent = R.linear.weight @ S + R.linear.bias + R.out.weight @ hidden
            assert torch.allclose(R(text, frames, v)[i, j], exponent.exp(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="needs t and v beside S"):
        R(text, frames)


def test_joint_radius_starts_as_the_linear_one():
    torch.manual_seed(0)
    joint = JointRadius(FRAMES, DIM)
    linear = joint.linear(cosine_similarities(text, frames)).exp()
    assert (joint(text, frames, randn(TEXTS, VIDEOS, DIM, seed=5)) / linear - 1).abs().max() < 0.05


def test_radius_starts_at_its_initial_value_for_orthogonal_frames():
    assert torch.allclose(
        LinearRadius(FRAMES, DIM, initial=0.1)(text, torch.zeros_like(frames)), torch.tensor(0.1)
    )


def test_radius_that_starts_as_the_identity_reads_frame_k_in_channel_k():
    R = LinearRadius(FRAMES, DIM, initial=0.3)
    torch.nn.init.eye_(R.linear.weight)  # as train.py does for --radius-start identity
    S = cosine_similarities(text, frames)
    expected = 0.3 * torch.cat([S.exp(), torch.ones(TEXTS, VIDEOS, DIM - FRAMES)], dim=-1)
    assert torch.allclose(R(text, frames), expected)


def test_radius_ignores_the_length_of_features():
    R = random_(LinearRadius(FRAMES, DIM))
    assert torch.allclose(R(9 * text, 0.1 * frames), R(text, frames), atol=1e-5)


def test_similarities_are_cosines():
    S = cosine_similarities(text, frames)
    assert S.shape == (TEXTS, VIDEOS, FRAMES)
    assert torch.allclose(S[4, 2, 1], cosine_similarity(text[4], frames[2, 1], dim=0))


def test_drawn_texts_equal_their_loop_with_shared_and_with_own_noise():
    radius = randn(TEXTS, VIDEOS, DIM, seed=2).exp()
    for noise in (randn(M, DIM, seed=3), randn(M, TEXTS, VIDEOS, DIM, seed=3)):
        t_s = stochastic_text(text, radius, noise)
        assert t_s.shape == (M, TEXTS, VIDEOS, DIM)
        eps = noise[4] if noise.dim() == 2 else noise[4, 3, 1]
        assert torch.allclose(t_s[4, 3, 1], text[3] + radius[3, 1] * eps)


def test_drawn_texts_have_the_mean_and_the_spread_of_the_mass():
    radius = randn(TEXTS, VIDEOS, DIM, seed=2).exp()
    t_s = stochastic_text(text, radius, randn(20_000, DIM, seed=3))
    assert ((t_s.mean(0) - text[:, None]) / radius).abs().max() < 0.05
    assert (t_s.std(0) / radius - 1).abs().max() < 0.05


def test_no_noise_is_the_text_itself():
    assert torch.equal(
        stochastic_text(text, torch.ones(TEXTS, VIDEOS, DIM), torch.zeros(1, DIM))[0, :, 2], text
    )


def test_support_text_lies_on_the_surface_towards_the_video():
    video = randn(TEXTS, DIM, seed=2)
    t_sup = support_text(text, video, torch.full((TEXTS, DIM), 0.7))
    assert torch.allclose((t_sup - text).norm(dim=1), torch.full((TEXTS,), 0.7))
    assert torch.allclose(cosine_similarity(t_sup - text, video - text), torch.ones(TEXTS))
    wide = support_text(text, video, torch.full((TEXTS, DIM), 0.7) * torch.tensor([1.0] + [2.0] * (DIM - 1)))
    assert torch.allclose(
        (wide - text)[:, 1:], 2 * (t_sup - text)[:, 1:]
    )  # the radius acts channel by channel


def test_matched_takes_text_i_with_video_i():
    pairs = randn(TEXTS, TEXTS, DIM)
    assert torch.equal(matched(pairs), torch.stack([pairs[i, i] for i in range(TEXTS)]))


def test_noise_follows_its_prior_and_its_generator():
    def draw(*shape, **options):
        return sample_noise(*shape, generator=torch.Generator().manual_seed(3), **options)

    assert draw(M, TEXTS, VIDEOS, DIM).shape == (M, TEXTS, VIDEOS, DIM)
    assert torch.equal(draw(M, DIM), draw(M, DIM)) and torch.equal(draw(M, DIM, std=0.5), 0.5 * draw(M, DIM))
    uniform = draw(500, 99, prior="uniform")
    assert uniform.min() >= 0 and uniform.max() <= 1 and abs(uniform.mean() - 0.5) < 0.01


# ------------------------------------------------------------------------------------------------- TMASS


@pytest.mark.parametrize("trunk", ["resnet", "vit"])
def test_frames_are_encoded_each_by_itself(trunk):
    model = TMASS(small_clip(trunk), "xpool", "none").eval()
    images = randn(2, 3, 3, 32, 32)
    features = model.encode_frames(images)
    assert features.shape == (2, 3, 24)
    assert torch.allclose(model.encode_frames(images[1:, 2:])[0, 0], features[1, 2], atol=1e-4)


def test_text_equals_clips_own_encoding():
    model, tokens = TMASS(small_clip()).eval(), torch.randint(1, 49406, (TEXTS, 20))
    tokens[:, 7] = 49407
    assert torch.allclose(model.encode_text(tokens), model.clip.encode_text(tokens), atol=1e-5)


def test_methods_differ_in_psi_and_R_alone():
    mean, xpool, tmass = (random_model(method) for method in ("clip", "xpool", "tmass"))
    assert (
        isinstance(mean.fusion, MeanPool)
        and isinstance(xpool.fusion, XPool)
        and isinstance(tmass.fusion, XPool)
    )
    assert mean.radius is None and xpool.radius is None and isinstance(tmass.radius, LinearRadius)
    assert set(tmass.state_dict()) - set(xpool.state_dict()) == {"radius.linear.weight", "radius.linear.bias"}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("radius", ["none", *RADII])
def test_every_psi_goes_with_every_radius(fusion, radius):
    model = TMASS(small_clip(), fusion, radius, FRAMES).eval()
    t, f = randn(TEXTS, 24), randn(VIDEOS, FRAMES, 24, seed=1)
    video = model.fusion(t, f)
    assert video.shape == (TEXTS, VIDEOS, 24)
    if radius != "none":
        R = model.radius(t, f, video)
        assert R.shape == (TEXTS, VIDEOS, 24) and R.min() > 0


@pytest.mark.parametrize(
    "build",
    [
        lambda: TMASS(small_clip(), "glue"),
        lambda: TMASS(small_clip(), "xpool", "oval"),
        lambda: XPool(DIM, heads=3),
    ],
)
def test_unknown_parts_are_refused_with_the_choice(build):
    with pytest.raises(ValueError, match="choose"):
        build()


@pytest.mark.parametrize("name", model.MOVED)
def test_names_of_before_are_still_found_in_model(name):
    assert getattr(model, name).__name__ == name


def test_stage_files_import_no_more_than_torch_numpy_and_jaxtyping():
    code = (
        "import sys; import torch, numpy, jaxtyping; before = set(sys.modules); import model, losses;"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "['losses', 'model']"
