"""The first look at all clips ranks nearly as the exact score: the best are among those it keeps."""

import numpy as np
import pytest
import test_library
import torch
from conftest import randn, random_model, small_clip

from engine import firstpass
from engine.scoring import noise_bank, scores
from model import TMASS

CLIPS, FRAMES, DIM, M, SAMPLE = 600, 4, 24, 5, 64
toys = test_library.toys  # a fixture: psis that are not known


def near(options: dict) -> TMASS:
    """A random model whose psi and R are nearer to where training starts and ends."""
    model, start = random_model(frames=FRAMES, **options), TMASS(small_clip(), num_frames=FRAMES, **options)
    for part, other in ((model.fusion, start.fusion), (model.radius, start.radius)):
        for own, initial in zip(part.parameters(), other.parameters()):
            own.data = 0.75 * initial.data + 0.25 * own.data
    return model


def looked(model, text, frames, noise) -> torch.Tensor:
    """The approximate scores, of two pieces of unequal size."""
    half = frames.half()
    scale = (half.float().var(dim=-1, correction=0) + 1e-5).rsqrt().numpy()
    look = firstpass.FirstLook(model).fit(text, noise, half[:SAMPLE].float())
    pieces = [(half.numpy()[part], scale[part]) for part in (slice(0, 401), slice(401, None))]
    return look.all_scores(pieces)


@pytest.mark.parametrize("radius", ["linear", "joint", "scalar"])
def test_the_best_clips_are_among_those_that_a_first_look_finds(radius):
    model, frames = near({"fusion": "xpool", "radius": radius}), randn(CLIPS, FRAMES, DIM)
    frames += randn(CLIPS, 1, DIM, seed=1)
    for seed in range(3):
        text, noise = randn(1, DIM, seed=10 + seed), noise_bank(M, DIM, seed)
        exact, found = scores(model, text, frames, noise)[0], looked(model, text, frames, noise)
        assert np.corrcoef(exact, found)[0, 1] > 0.95
        best, kept = exact.topk(10).indices.tolist(), found.topk(CLIPS // 10).indices.tolist()
        assert {*best} <= {*kept}


@pytest.mark.parametrize("fusion", ["mean", "xpool"])
def test_a_first_look_without_a_mass_is_the_cosine_where_every_eigenvector_counts(fusion, monkeypatch):
    monkeypatch.setattr(firstpass, "EIGENVECTORS", DIM)
    model, frames = random_model(frames=FRAMES, fusion=fusion, radius="none"), randn(CLIPS, FRAMES, DIM)
    frames -= frames.mean(dim=-1, keepdim=True)  # then all scales are 1 / length, as in mean pooling
    for name in ("out", "value", "linear", "norm1", "norm2", "norm3") if fusion == "xpool" else ():
        getattr(model.fusion, name).bias.data.zero_()  # what the slope and the level stand for
    text, noise = randn(1, DIM, seed=3), noise_bank(0, DIM, 0)
    if fusion == "xpool":
        model.fusion.norm3.weight.data.fill_(1)  # |v| is the same for all clips
    exact, found = scores(model, text, frames, noise)[0], looked(model, text, frames, noise)
    assert torch.allclose(exact, found, atol=3e-3)  # frames of half precision


def test_the_number_of_threads_is_as_before_and_another_psi_is_not_known(toys):
    before, model = torch.get_num_threads(), random_model(frames=FRAMES)
    looked(model, randn(1, DIM), randn(CLIPS, FRAMES, DIM), noise_bank(M, DIM, 0))
    assert torch.get_num_threads() == before and firstpass.FirstLook.knows(model)
    for options in ({"heads": 2}, {"fusion": "last"}, {"fusion": "odd"}):
        assert not firstpass.FirstLook.knows(random_model(frames=FRAMES, **options))
