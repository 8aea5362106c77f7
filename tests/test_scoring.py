"""Fast scores equal the literal ones, noise is what it says, and no score sees more than its pair."""

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, randn, random_model, small_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import engine.scoring
import model as tmass
from engine.fast_training import best_of_draws
from engine.scoring import (
    Delta,
    Expectation,
    MonteCarlo,
    PairNoise,
    _Task,
    best_of,
    noise_bank,
    scores,
)
from evaluate import scores_literal
from losses import cosine_scores
from model import FUSIONS, RADII, TMASS, LinearRadius, MeanPool, XPool, matched, stochastic_text

TEXTS, VIDEOS, FRAMES, DIM, M = 7, 5, 4, 24, 6


text, frames, noise = 3 * randn(TEXTS, DIM), 5 * randn(VIDEOS, FRAMES, DIM, seed=1), noise_bank(M, DIM, 0)
model = random_model(frames=FRAMES)


KINDS = [("mean", "none"), ("mean", "linear"), ("xpool", "none"), *(("xpool", radius) for radius in RADII)]


@pytest.fixture(autouse=True)
def no_silent_fallback():
    """A fast form that is not used is an error, unless a test expects it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(fast form|literal)")
        yield


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    heads=st.sampled_from([1, 2, 3]),
    texts=st.integers(1, 9),
    videos=st.integers(1, 9),
    count=st.integers(1, 5),
    draws=st.integers(0, 4),
    block=st.sampled_from([1, 7, None]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_fast_scores_equal_the_literal_ones(kind, heads, texts, videos, count, draws, block, dtype):
    model = random_model(frames=count, fusion=kind[0], radius=kind[1], heads=heads).to(dtype)
    t, f = 3 * randn(texts, DIM, seed=texts).to(dtype), 5 * randn(videos, count, DIM, seed=videos).to(dtype)
    eps = noise_bank(draws, DIM, 0).to(dtype)
    expected, tolerance = scores_literal(model, t, f, eps), 2e-5 if dtype == torch.float32 else 1e-12
    assert torch.allclose(scores(model, t, f, eps, block=block), expected, atol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("noise", [noise, Expectation(M), Delta(M), MonteCarlo(M, 3), PairNoise(M, seed=3)])
def test_scores_do_not_depend_on_the_device(noise):
    on_cuda = scores(random_model(frames=FRAMES).cuda(), text.cuda(), frames.cuda(), noise).cpu()
    assert torch.allclose(on_cuda, scores(model, text, frames, noise), atol=2e-5)


@pytest.mark.parametrize("block", [1, 6, None])
def test_own_draws_for_each_pair_do_not_depend_on_blocks_ranks_or_other_pairs(block):
    noise = PairNoise(M, seed=3)
    eps = noise.block(range(TEXTS), range(VIDEOS), DIM)
    whole = scores_literal(model, text, frames, eps)
    assert torch.allclose(scores(model, text, frames, noise, block=block), whole, atol=2e-5)
    assert torch.allclose(
        scores(model, text, frames[2:], replace(noise, first_video=2), block=block), whole[:, 2:], atol=2e-5
    )
    assert (
        len({round(float(x), 6) for x in eps[0, :, :, 0].flatten()}) == TEXTS * VIDEOS
    )  # no two pairs have the same draws


@pytest.mark.parametrize("block", [1, 6, None])
def test_a_radius_of_text_and_video_is_scored_alike_in_every_way(block):
    joint = random_model(frames=FRAMES, radius="joint")
    v = joint.fusion(text, frames)
    R = joint.radius(text, frames, v)
    own = PairNoise(M, seed=3)
    drawn = scores_literal(joint, text, frames, own.block(range(TEXTS), range(VIDEOS), DIM))
    assert torch.allclose(scores(joint, text, frames, own, block=block), drawn, atol=2e-5)
    for form in (Expectation(M), Delta(M)):
        found = scores(joint, text, frames, form, block=block)
        assert torch.allclose(found, form.of(text[:, None], R, v), atol=2e-5)


def test_own_and_shared_draws_agree_in_distribution():
    shared = torch.stack([scores(model, text, frames, noise_bank(M, DIM, seed)) for seed in range(150)])
    own = torch.stack([scores(model, text, frames, PairNoise(M, seed)) for seed in range(150)])
    error = (shared.var(0) / 150 + own.var(0) / 150).sqrt()
    assert ((shared.mean(0) - own.mean(0)).abs() / error).max() < 4.5
    assert (shared.std(0) / own.std(0) - 1).abs().max() < 0.35


@pytest.mark.parametrize("spread, tolerance", [(0.0, 0.03), (0.5, 0.04), (1.5, 0.1)])
def test_the_expectation_is_the_mean_of_many_samplings_for_even_and_uneven_radii(spread, tolerance):
    """Against 5,000 banks of 20 draws, in standard deviations of a draw; spread: std of log R over channels.
    The delta form is as good only where R is even."""
    pairs, dim, banks = 6, 256, 5000
    t, v = 0.6 * randn(pairs, dim), randn(pairs, dim, seed=1)
    v, R = v + t * torch.linspace(0, 2, pairs)[:, None], (spread * randn(pairs, dim, seed=2) - 1).exp()
    eps = noise_bank(20 * banks, dim, 3)
    t_s = (eps @ (R * v).T + (t * v).sum(-1)) / v.norm(dim=-1)
    squares = eps.square() @ R.square().T + 2 * eps @ (R * t).T + t.square().sum(-1)
    cosines = t_s / squares.sqrt()
    best, draw = cosines.unflatten(0, (banks, 20)).amax(1).mean(0), cosines.std(0)
    assert ((Expectation(20).of(t, R, v) - best) / draw).abs().max() < tolerance
    assert ((Expectation(1).of(t, R, v) - cosines.mean(0)) / draw).abs().max() < 4.5 / (20 * banks) ** 0.5
    low, high = {0.0: (0, 0.15), 0.5: (0, 0.5), 1.5: (0.5, 5)}[spread]  # what its docstring says
    wrong = ((Delta(20).of(t, R, v) - best) / draw).abs().max()
    assert low <= wrong < high


def test_expectations_of_other_priors():
    """N(0, 0.3^2) is R made smaller. U(0, 1) has no exact form; its delta form is near the mean of banks."""
    R, v = 0.5 * randn(TEXTS, VIDEOS, DIM).exp(), randn(TEXTS, VIDEOS, DIM, seed=1)
    narrow, smaller = (
        Expectation(M, std=0.3).of(text[:, None], R, v),
        Expectation(M).of(text[:, None], 0.3 * R, v),
    )
    assert torch.allclose(narrow, smaller, atol=1e-6)
    with pytest.raises(ValueError, match="normal prior"):
        Expectation(M, "uniform").of(text[:, None], R, v)
    torch.manual_seed(0)
    wide = TMASS(small_clip(), num_frames=FRAMES)
    wide.fusion, wide.radius = XPool(256).eval(), LinearRadius(FRAMES, 256, initial=0.5)
    t, f = 1.5 * randn(4, 256), randn(3, FRAMES, 256, seed=1)
    many = scores(wide, t, f, MonteCarlo(20, 300, prior="uniform"))
    assert (scores(wide, t, f, Delta(20, "uniform")) - many).abs().max() < 0.01


@pytest.mark.parametrize("block", [1, 6, None])
def test_monte_carlo_is_the_mean_over_banks_of_the_best_draw(monkeypatch, block):
    form = MonteCarlo(M, banks=3, seed=5)
    banks = torch.stack([scores(model, text, frames, bank) for bank in form.draws(DIM).split(M)])
    expected = {False: banks.mean(0), True: banks.std(0) / 3**0.5}
    for error, value in expected.items():
        own = replace(form, error=error)
        assert torch.allclose(scores(model, text, frames, own, block=block), value, atol=1e-5)
        literal = _Task(model, text, frames, own, None).literal_block(range(TEXTS), range(VIDEOS))
        assert torch.allclose(literal, value, atol=1e-5)


def test_the_standard_error_of_monte_carlo_is_its_spread_over_seeds():
    forms = [MonteCarlo(M, banks=10, seed=seed) for seed in range(60)]
    found = torch.stack([scores(model, text, frames, form) for form in forms]).std(0)
    said = torch.stack([scores(model, text, frames, replace(form, error=True)) for form in forms]).mean(0)
    assert 0.85 < (found / said).mean() < 1.2


def test_best_of_draws_equals_its_loops_and_the_soft_maximum_lies_below():
    R, v = 0.5 * randn(TEXTS, VIDEOS, DIM).exp(), randn(TEXTS, VIDEOS, DIM, seed=1)
    cosines = torch.stack([cosine_scores(text[:, None] + R * eps, v) for eps in noise])
    assert torch.allclose(best_of_draws(text, R, v, noise), cosines.amax(0), atol=1e-6)
    soft = (7 * cosines).exp().mean(0).log() / 7
    assert torch.allclose(best_of_draws(text, R, v, noise, scale=7.0), soft, atol=1e-5)
    assert (soft < cosines.amax(0)).all() and (soft > cosines.mean(0)).all()


@pytest.mark.filterwarnings("ignore:.*scores are NaN")
@pytest.mark.parametrize(
    "form", [noise, PairNoise(M, seed=3), MonteCarlo(M, 2), Delta(M), Delta(M, "uniform")]
)
@pytest.mark.parametrize("form_of", ["fast", "literal"])
def test_a_radius_of_any_size_gives_the_score_of_float64_or_nan(monkeypatch, form, form_of):
    """Its squares overflow in float32 from about e^43 on, where a cosine was 0. Up to e^40 none is lost."""
    if form_of == "literal":
        monkeypatch.setattr(_Task, "without_fast_form", lambda task: "a radius")
        monkeypatch.setattr("engine.scoring.warnings.warn", lambda *_, **__: None)
    lost = {}
    for log in (0, 10, 19, 40, 42, 43, 44, 45, 60):
        models = [random_model(frames=FRAMES).to(dtype) for dtype in (torch.float32, torch.float64)]
        for each in models:
            each.radius.linear.bias.data += log
        exact = scores(models[1], text.double(), frames.double(), form)
        found = scores(models[0], text, frames, form)
        lost[log] = found.isnan().sum().item()
        assert ((found - exact).abs().nan_to_num() < 2e-5).all(), log
    uniform = form == Delta(M, "uniform")
    assert not any(lost[log] for log in (0, 10, 19) + (() if uniform else (40,)))
    assert lost[45] == lost[60] == TEXTS * VIDEOS


def test_a_radius_that_is_too_large_and_texts_of_float16_give_one_sentence_each():
    large = random_model(frames=FRAMES)
    large.radius.linear.bias.data += 60
    with pytest.warns(UserWarning, match="35 of 35 scores are NaN or infinite: R is too large"):
        scores(large, text, frames, noise)
    with pytest.raises(ValueError, match=r"^texts of float16 cannot be scored, .*: give text\.float\(\)\.$"):
        scores(model, text.half(), frames.half(), noise)


def test_the_largest_of_M_normals():
    assert best_of(1) == pytest.approx(0, abs=1e-9)
    assert best_of(2) == pytest.approx(np.pi**-0.5, abs=1e-9)
    assert best_of(20) == pytest.approx(1.86748, abs=1e-4)  # Harter's table


def test_literal_score_is_the_best_draw_of_its_pair():
    for i in range(TEXTS):
        for j in range(VIDEOS):
            t, f = text[i : i + 1], frames[j : j + 1]
            v, R = model.fusion(t, f)[0, 0], model.radius(t, f)[0, 0]
            draws = [torch.cosine_similarity(t[0] + R * eps, v, dim=0) for eps in noise]
            assert torch.allclose(scores_literal(model, text, frames, noise)[i, j], max(draws), atol=1e-5)


def released_protocol(model, text, frames, noise):
    """The released evaluator's formula: video j is pooled by its own caption j, for every query."""
    video = matched(model.fusion(text, frames))
    t_s = stochastic_text(text, model.radius(text, frames), noise)
    return (normalize(t_s, dim=-1) * normalize(video, dim=-1)).sum(-1).amax(0)


def edits_leave_other_rows(score) -> bool:
    edited = text.clone()
    edited[1] = randn(DIM, seed=9)  # not "+= 1": LayerNorm would not see it
    before, after = score(model, text[:VIDEOS], frames, noise), score(model, edited[:VIDEOS], frames, noise)
    return ((after - before).abs() > 1e-5).any(dim=1).tolist() == [row == 1 for row in range(VIDEOS)]


@pytest.mark.parametrize("score", [scores, scores_literal])
def test_editing_one_caption_moves_only_its_row(score):
    assert edits_leave_other_rows(score)


def test_the_released_protocol_is_caught_by_that_test():
    assert not edits_leave_other_rows(released_protocol)


def test_protocol_released_is_the_released_formula():
    t = text[:VIDEOS]
    assert torch.allclose(
        scores(model, t, frames, noise, own_text=t), released_protocol(model, t, frames, noise), atol=2e-5
    )
    assert not edits_leave_other_rows(lambda m, t, f, e: scores(m, t, f, e, own_text=t))


def test_half_precision_features_are_read_a_block_at_a_time():
    for t in (text, text[:2]):
        assert torch.allclose(
            scores(model, t, frames.half(), noise), scores(model, t, frames.half().float(), noise), atol=1e-6
        )


@pytest.fixture
def threads():
    """Sets the number of torch's threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("noise", [noise_bank(4, DIM, 0), PairNoise(4)])
@pytest.mark.parametrize("fusion", ["xpool", "max"])  # max: literally
def test_threads_score_as_one_does(registered, threads, mode, noise, fusion):
    model, text, frames = random_model(frames=FRAMES, fusion=fusion), randn(30, DIM), randn(40, FRAMES, DIM)
    found = []
    for count in (1, 3):
        threads(count)
        warned = pytest.warns(UserWarning, match="no fast form") if fusion == "max" else nullcontext()
        with mode(), warned:
            found.append(scores(model, text, frames, noise, block=64).clone())
        assert torch.get_num_threads() == count
    assert torch.allclose(*found, atol=1e-6) and not found[1].requires_grad


def test_a_failure_in_a_thread_is_raised_and_leaves_torch_as_it_was(threads, monkeypatch):
    model, text, frames, noise = (
        random_model(frames=FRAMES),
        randn(30, DIM),
        randn(40, FRAMES, DIM),
        noise_bank(4, DIM, 0),
    )
    threads(3)
    whole = scores(model, text, frames, noise, block=64)
    with monkeypatch.context() as patch:
        patch.setattr(engine.scoring._Atoms, "of", lambda *_: [][0])
        with pytest.raises(IndexError):
            scores(model, text, frames, noise, block=64)
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(4) as pool:  # calls at the same time, as of a server
        for found in pool.map(lambda _: scores(model, text, frames, noise, block=64), range(8)):
            assert torch.allclose(found, whole, atol=1e-6)
    assert torch.get_num_threads() == 3 and not engine.scoring._pool.locked()


ONE_THREAD_EACH = """
import os, torch
from engine.scoring import in_threads

def count(_):
    for _ in range(20):
        a @ b.T
    return len(os.listdir("/proc/self/task"))

a, b, found = torch.randn(768, 512), torch.randn(64, 512), []
before = count(0)
list(in_threads(lambda _: found.append(count(0)), range(4)))
assert max(found) <= before + 2, (before, found)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_threads_of_blocks_start_no_threads_of_their_own():
    """A product in a new thread would start as many as there are cores: four on two, in each other's way."""
    two = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", ONE_THREAD_EACH], env=two, check=True)


@pytest.mark.parametrize("M", [1, 20, 70])
def test_blocks_of_many_and_of_few_videos_have_the_same_scores(threads, M):
    """(R t) E' is one product in a block of few videos or many draws, else one product for each text."""
    threads(1)
    model, text, frames = random_model(frames=FRAMES), randn(9, DIM), randn(70, FRAMES, DIM, seed=1)
    few, many = (scores(model, text, frames, noise_bank(M, DIM, 0), block=block) for block in (64, 4096))
    assert torch.allclose(few, many, atol=1e-6)
    assert torch.allclose(many, scores_literal(model, text, frames, noise_bank(M, DIM, 0)), atol=2e-5)


def test_memory_does_not_grow_with_the_draws(threads):
    """A counting mode watches every operation: the largest tensor is that of a block of pairs."""
    threads(1)  # the mode is that of this thread
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple) else (result,):
                self.size = max(self.size, x.numel() if isinstance(x, torch.Tensor) else 0)
            return result

    sizes = []
    for M, texts, videos in ((2, 40, 40), (12, 40, 40), (12, 80, 80)):
        inputs = randn(texts, DIM), randn(videos, FRAMES, DIM), noise_bank(M, DIM, 0)
        with Largest() as largest:
            scores(model, *inputs, block=256)
        sizes.append(largest.size)
    assert sizes == [2 * 256 * DIM] * 3  # the buffer: two tensors of a block of pairs


@pytest.mark.parametrize("score", [scores, scores_literal])
def test_cutting_and_permuting_the_gallery_cuts_and_permutes_the_scores(score):
    whole = score(model, text, frames, noise)
    videos, texts = torch.tensor([3, 0, 4]), torch.tensor([6, 2])
    assert torch.allclose(
        score(model, text[texts], frames[videos], noise), whole[texts][:, videos], atol=1e-5
    )
    assert torch.allclose(score(model, text[2:3], frames[4:5], noise), whole[2:3, 4:5], atol=1e-5)


def test_no_draws_score_the_text_itself_and_more_draws_never_score_less():
    assert torch.allclose(
        scores(model, text, frames, noise[:0]), cosine_scores(text, model.fusion(text, frames)), atol=1e-5
    )
    few, many = scores(model, text, frames, noise[:2]), scores(model, text, frames, noise)
    assert (many >= few - 1e-6).all() and (many > few + 1e-4).any()


def test_scores_leave_the_model_and_autograd_alone():
    assert not scores(model, text, frames, noise).requires_grad


def test_noise_bank_is_its_seed_and_its_prior():
    assert torch.equal(noise_bank(4, 9, 0), noise_bank(4, 9, 0)) and not torch.equal(
        noise_bank(4, 9, 0), noise_bank(4, 9, 1)
    )
    normal, uniform = noise_bank(500, 99, 0, std=0.1), noise_bank(500, 99, 0, "uniform")
    assert abs(normal.mean()) < 1e-3 and abs(normal.std() - 0.1) < 1e-3
    assert abs(uniform.mean() - 0.5) < 1e-2 and uniform.min() >= 0 and uniform.max() <= 1


# ------------------------------------------------------------------ nothing is scored as something else


class MaxPool(torch.nn.Module):
    """A psi without a fast form."""

    def __init__(self, dim, heads=1, dropout=0.0):
        super().__init__()
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, text, frames):
        weight = (text[:, None, None] * frames).sum(-1, keepdim=True).softmax(dim=2)
        return self.dropout((weight * frames).amax(dim=2))


class Negated(XPool):
    """A subclass of a psi with a fast form, whose forward does something else."""

    def forward(self, text, frames):
        return -super().forward(text, frames)


class Doubled(LinearRadius):
    """A subclass of a radius with a fast form, whose forward does something else."""

    def forward(self, text, frames, video=None):
        return 2 * super().forward(text, frames, video)


class Norms(torch.nn.Module):
    """A radius of features that are not normalised, and no Radius."""

    def __init__(self, frames, dim, initial=1.0):
        super().__init__()

    def forward(self, text, frames, video=None):
        return (0.1 * (text[:, None] - frames.mean(1)).abs()).exp()


@pytest.fixture
def registered(monkeypatch):
    for name, psi in {"max": MaxPool, "negated": Negated}.items():
        monkeypatch.setitem(FUSIONS, name, psi)
    for name, radius in {"doubled": Doubled, "norms": Norms}.items():
        monkeypatch.setitem(RADII, name, radius)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("block", [1, 6, None])
@pytest.mark.parametrize(
    "fusion, radius",
    [("max", "none"), ("max", "linear"), ("negated", "none"), ("xpool", "doubled"), ("mean", "norms")],
)
def test_a_psi_or_radius_without_a_fast_form_is_scored_literally_and_said_so(
    registered, fusion, radius, block
):
    model = random_model(frames=FRAMES, fusion=fusion, radius=radius, dropout=0.5)
    own, mass = PairNoise(M, seed=3), radius != "none"
    forms = [(noise, noise), (own, own.block(range(TEXTS), range(VIDEOS), DIM))]
    for form, literal in forms:
        with pytest.warns(UserWarning, match="has no fast form"):
            found = scores(model.train(), text, frames, form, block=block)  # dropout is off all the same
        assert torch.allclose(found, scores_literal(model.eval(), text, frames, literal), atol=1e-6)
    if mass:
        video = model.fusion(text, frames)
        for form in (Expectation(M), Delta(M)):
            expected = form.of(text[:, None], model.radius(text, frames, video), video)
            with pytest.warns(UserWarning):
                found = scores(model, text, frames, form, block=block)
            assert torch.allclose(found, expected, atol=1e-5)


def forward_without_projection(self, text, frames):
    return torch.einsum("tvhf,vfd->tvd", self.attention(text, frames), frames)


@pytest.mark.parametrize(
    "where, name, changed",
    [
        (XPool, "forward", forward_without_projection),
        (MeanPool, "forward", lambda self, text, frames: frames.mean(1).expand(len(text), -1, -1)),
        (tmass.Radius, "forward", lambda self, text, frames, video=None: torch.full_like(video, 3.0)),
    ],
)
def test_a_change_of_model_py_is_never_scored_as_what_it_was(monkeypatch, where, name, changed):
    monkeypatch.setattr(where, name, changed)
    model = random_model(frames=FRAMES, fusion="mean" if where is MeanPool else "xpool")
    with pytest.warns(UserWarning, match="literal ones are used"):
        found = scores(model, text, frames, noise)
    assert torch.allclose(found, scores_literal(model, text, frames, noise), atol=1e-6)


def test_the_fast_form_is_used_and_silent_where_there_is_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fusion, radius in KINDS:
            scores(random_model(frames=FRAMES, fusion=fusion, radius=radius), text, frames, noise)


@pytest.mark.parametrize("fusion, radius", KINDS)
def test_bfloat16_has_its_fast_form_too(fusion, radius):
    model = random_model(frames=FRAMES, fusion=fusion, radius=radius).bfloat16()
    inputs = [tensor.bfloat16() for tensor in (text, frames, noise)]
    found = scores(model, *inputs).float()
    assert (found - scores_literal(model.float(), text, frames, noise)).abs().max() < 0.05


class OwnParameter(tmass.Radius):
    """A radius of any text and video: exp of a parameter."""

    def __init__(self, frames, dim, initial=1.0):
        super().__init__(frames, dim)
        self.log_radius = torch.nn.Parameter(torch.full((dim,), -1.0))

    def exponent(self, sims, text, video):
        return self.log_radius


def test_scoring_does_not_overwrite_what_a_radius_returns(monkeypatch):
    monkeypatch.setitem(RADII, "own", OwnParameter)
    model = random_model(frames=FRAMES, radius="own")
    before = model.radius.log_radius.clone()
    for some in (text, text[:1]):
        assert torch.allclose(
            scores(model, some, frames, noise), scores_literal(model, some, frames, noise), atol=2e-5
        )
    assert torch.equal(model.radius.log_radius, before)
