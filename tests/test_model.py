import ast
import math
import pickle
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from conftest import ROOT, randn, random_model, small_clip
from torch.nn.functional import cosine_similarity, layer_norm

from model import (
    TMASS,
    MeanPool,
    ModelError,
    Radius,
    XPool,
    cosine_similarities,
    load_checkpoint,
    load_clip,
    load_file,
    matched,
    save_checkpoint,
    stochastic_text,
    support_text,
)

M, TEXTS, VIDEOS, FRAMES, DIM = 6, 5, 3, 4, 8


def random_(module: torch.nn.Module) -> torch.nn.Module:
    for k, parameter in enumerate(module.parameters()):
        parameter.data += 0.5 * randn(*parameter.shape, seed=k)
    return module.eval()


text, frames = randn(TEXTS, DIM), randn(VIDEOS, FRAMES, DIM, seed=1)


# ---------------------------------------------------------------------------------------------------------------------------- psi


@pytest.mark.parametrize("heads", [1, 2])
def test_xpool_equals_its_equations_pair_by_pair(heads):
    psi, size = random_(XPool(DIM, heads)), DIM // heads

    def norm(layer, x):
        return layer_norm(x, (DIM,), layer.weight, layer.bias)

    for i in range(TEXTS):
        for j in range(VIDEOS):
            q, k, u = psi.query(norm(psi.norm1, text[i])), psi.key(norm(psi.norm1, frames[j])), psi.value(norm(psi.norm1, frames[j]))
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


def test_attention_sums_to_one_and_turns_to_the_likelier_frame():
    psi = XPool(DIM, 2)
    assert torch.allclose(psi.attention(text, frames).sum(-1), torch.ones(TEXTS, VIDEOS, 2))
    frame_like_text = torch.stack([text[0], -text[0]])[None]
    assert psi.attention(text[:1], frame_like_text)[0, 0, :, 0].min() > 0.5  # the identity start looks for likeness


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


# ------------------------------------------------------------------------------------------------------------------ the text mass


@pytest.mark.parametrize("kind", ["fixed", "scalar", "linear"])
def test_radius_equals_its_equation_pair_by_pair(kind):
    R = random_(Radius(kind, FRAMES, DIM, initial=0.3))
    for i in range(TEXTS):
        for j in range(VIDEOS):
            S = torch.stack([cosine_similarity(text[i], frames[j, k], dim=0) for k in range(FRAMES)])
            exponent = R.linear.weight @ S + R.linear.bias if kind == "linear" else S.mean() * (R.theta if kind == "scalar" else 1)
            assert torch.allclose(R(text, frames)[i, j], exponent.exp().expand(DIM), atol=1e-5)


def test_joint_radius_equals_its_equation_pair_by_pair():
    R, v = random_(Radius("joint", FRAMES, DIM, initial=0.3)), randn(TEXTS, VIDEOS, DIM, seed=5)
    for i in range(TEXTS):
        for j in range(VIDEOS):
            S = torch.stack([cosine_similarity(text[i], frames[j, k], dim=0) for k in range(FRAMES)])
            t_, v_ = (x / x.norm() * DIM**0.5 for x in (text[i], v[i, j]))
            hidden = torch.nn.functional.gelu(R.text.weight @ t_ + R.text.bias + R.video.weight @ v_)
            exponent = R.linear.weight @ S + R.linear.bias + R.out.weight @ hidden
            assert torch.allclose(R(text, frames, v)[i, j], exponent.exp(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ModelError, match="needs t and v beside S"):
        R(text, frames)


def test_joint_radius_starts_as_the_linear_one():
    torch.manual_seed(0)
    joint = Radius("joint", FRAMES, DIM)
    linear = joint.linear(cosine_similarities(text, frames)).exp()
    assert (joint(text, frames, randn(TEXTS, VIDEOS, DIM, seed=5)) / linear - 1).abs().max() < 0.05


def test_radius_starts_at_its_initial_value_for_orthogonal_frames():
    assert torch.allclose(Radius("linear", FRAMES, DIM, initial=0.1)(text, torch.zeros_like(frames)), torch.tensor(0.1))


def test_radius_ignores_the_length_of_features():
    R = random_(Radius("linear", FRAMES, DIM))
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
    assert torch.equal(stochastic_text(text, torch.ones(TEXTS, VIDEOS, DIM), torch.zeros(1, DIM))[0, :, 2], text)


def test_support_text_lies_on_the_surface_towards_the_video():
    video = randn(TEXTS, DIM, seed=2)
    t_sup = support_text(text, video, torch.full((TEXTS, DIM), 0.7))
    assert torch.allclose((t_sup - text).norm(dim=1), torch.full((TEXTS,), 0.7))
    assert torch.allclose(cosine_similarity(t_sup - text, video - text), torch.ones(TEXTS))
    wide = support_text(text, video, torch.full((TEXTS, DIM), 0.7) * torch.tensor([1.0] + [2.0] * (DIM - 1)))
    assert torch.allclose((wide - text)[:, 1:], 2 * (t_sup - text)[:, 1:])  # the radius acts channel by channel


def test_matched_takes_text_i_with_video_i():
    pairs = randn(TEXTS, TEXTS, DIM)
    assert torch.equal(matched(pairs), torch.stack([pairs[i, i] for i in range(TEXTS)]))


# ---------------------------------------------------------------------------------------------------------------- the whole model


@pytest.mark.parametrize("trunk", ["resnet", "vit"])
def test_frames_are_encoded_each_by_itself(trunk):
    model = TMASS(small_clip(trunk), num_frames=FRAMES)
    images = randn(VIDEOS, FRAMES, 3, model.resolution, model.resolution)
    encoded = model.eval().encode_frames(images)
    assert encoded.shape == (VIDEOS, FRAMES, 24)
    assert torch.allclose(model.encode_frames(images[1:2, 2:3])[0, 0], encoded[1, 2], atol=1e-5)


def test_methods_differ_in_psi_and_R_alone():
    parts = {m: (type(t.fusion), t.radius is not None) for m in ("clip", "xpool", "tmass") for t in [TMASS(small_clip(), m)]}
    assert parts == {"clip": (MeanPool, False), "xpool": (XPool, False), "tmass": (XPool, True)}
    assert TMASS(small_clip()).logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-5)


@pytest.mark.parametrize("build", [lambda: TMASS(small_clip(), "glue"), lambda: Radius("oval", FRAMES, DIM), lambda: XPool(DIM, heads=3)])
def test_unknown_parts_are_refused_with_the_choice(build):
    with pytest.raises(ModelError, match="choose"):
        build()


# ------------------------------------------------------------------------------------------------------------------- CLIP's weights


@pytest.mark.parametrize("trunk", ["resnet", "vit"])
@pytest.mark.parametrize("archive", [False, True], ids=["state_dict", "jit"])
def test_weights_come_back_as_stored_whatever_their_sizes(tmp_path, trunk, archive):
    clip, path = small_clip(trunk), tmp_path / "weights.pt"
    if archive:  # as OpenAI stores them
        side = clip.visual.input_resolution
        torch.jit.trace(clip, (randn(2, 3, side, side), torch.ones(2, 20, dtype=torch.long)), check_trace=False).save(path)
    else:
        torch.save(clip.state_dict(), path)
    loaded = load_clip(str(path))
    assert not loaded.training and {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(clip.state_dict().values(), loaded.state_dict().values(), strict=True))


def test_tiny_is_clips_own_class_and_small():
    clip = load_clip("tiny")
    assert type(clip).__module__ == "clip.model" and sum(p.numel() for p in clip.visual.parameters()) < 2e6


def test_a_failed_download_says_what_to_fetch(monkeypatch):
    from model import _import_clip

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(_import_clip(), "load", offline)
    with pytest.raises(ModelError, match=r"ViT-B-16\.pt .*--weights"):
        load_clip("ViT-B/16")


def test_unknown_arch_missing_foreign_and_corrupt_weights_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"unknown arch 'ViT-Z'.*tiny.*ViT-B/32"):
        load_clip("ViT-Z")
    with pytest.raises(ModelError, match=r"gone\.pt not found"):
        load_clip("tiny", tmp_path / "gone.pt")
    torch.save({"some": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(ModelError, match=r"foreign\.pt holds no CLIP"):
        load_clip("tiny", tmp_path / "foreign.pt")
    (tmp_path / "corrupt.pt").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ModelError, match=r"corrupt\.pt is not a file of weights"):
        load_clip("tiny", tmp_path / "corrupt.pt")


# ------------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("options", [dict(method="clip"), dict(method="xpool", heads=2), dict(radius="fixed"), dict(radius="joint"), dict(frames=7)])
def test_checkpoint_gives_back_the_same_model(tmp_path, options):
    model = random_model(**options)
    save_checkpoint(tmp_path / "a" / "model.pt", model, step=3)
    loaded = load_checkpoint(tmp_path / "a" / "model.pt")
    assert loaded.arguments == model.arguments and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["model.pt"]


def test_checkpoint_loads_strictly(tmp_path):
    save_checkpoint(tmp_path / "model.pt", random_model())
    content = load_file(tmp_path / "model.pt")
    del content["model"]["radius.linear.weight"]
    torch.save(content, tmp_path / "less.pt")
    with pytest.raises(ModelError, match=r"less\.pt is not a checkpoint of train\.py"):
        load_checkpoint(tmp_path / "less.pt")


def test_checkpoint_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    with (tmp_path / "harmful.pt").open("wb") as file:
        pickle.dump({"model": Harmful(), "arguments": {}}, file)
    with pytest.raises(ModelError):
        load_checkpoint(tmp_path / "harmful.pt")
    assert not (tmp_path / "harmed").exists()


def test_truncated_checkpoint_gives_one_sentence(tmp_path):
    save_checkpoint(tmp_path / "model.pt", random_model())
    whole = (tmp_path / "model.pt").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"cut\.pt is not a file of weights, or is damaged"):
            load_checkpoint(tmp_path / "cut.pt")


@pytest.mark.parametrize("module", ["model", "losses"])
def test_module_can_be_copied_into_another_project(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    names = {a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names <= {"torch", "jaxtyping"}
