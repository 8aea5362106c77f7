"""engine/analysis.py: numbers of each query, complexity, uncertainty."""

import itertools

import numpy as np
import pytest
import scipy
import torch
from conftest import randn, random_model

from engine.analysis import (
    COSINE,
    ENTROPY,
    MARGIN,
    RADIUS,
    RELATIVE,
    SPREAD,
    THIRDS,
    TREND,
    by_group,
    complexity,
    first_answers,
    levels,
    noise_ratio,
    query_results,
    rejection,
    thirds,
    uncertainty,
    written,
)
from engine.metrics import relevance_metrics, retrieval_metrics
from engine.scoring import noise_bank
from evaluate import scores_literal
from model import stochastic_text

TEXTS, VIDEOS, FRAMES, DIM = 37, 9, 4, 24
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def scored():
    """A model, features, which video each text describes, scores, and what is relevant."""
    model, text, frames = random_model(frames=FRAMES), randn(TEXTS, DIM), randn(VIDEOS, FRAMES, DIM, seed=1)
    owner = torch.arange(TEXTS) % VIDEOS
    relevant = randn(TEXTS, VIDEOS, seed=2) > 0.8
    relevant[torch.arange(TEXTS), owner] = True
    with torch.no_grad():
        return (
            model,
            text,
            frames,
            owner,
            scores_literal(model, text, frames, noise_bank(5, DIM, 0)),
            relevant,
        )


def test_means_over_queries_are_the_metrics(scored):
    *_, owner, scores, relevant = scored
    found, metrics = query_results(*scored), retrieval_metrics(scores, owner)
    for way, k in itertools.product(("t2v", "v2t"), (1, 10)):
        assert found[f"{way} R@{k}"].mean() == pytest.approx(metrics[way][f"R@{k}"], abs=1e-4)
    for name, value in relevance_metrics(scores, relevant).items():
        assert found[f"t2v {name}"].mean() == pytest.approx(value)
    assert found["fitting"].tolist() == relevant.sum(dim=1).tolist()


@torch.no_grad()
def test_uncertainties_equal_their_loops(scored):
    model, text, frames, _, scores, _ = scored
    found, std = query_results(*scored, prior="normal", std=0.5), 0.5
    noise, scale = noise_bank(200, DIM, 0, std=std), model.logit_scale.exp()
    for i in range(0, TEXTS, 5):
        first, second = scores[i].topk(2).values.tolist()
        j = int(scores[i].argmax())
        t, f = text[i : i + 1], frames[j : j + 1]
        video = model.fusion(t, f)
        radius = model.radius(t, f, video)
        drawn = torch.cosine_similarity(stochastic_text(t, radius, noise), video, dim=-1)
        p = (scale * scores[i]).softmax(dim=0)
        assert found["answer"][i] == j
        expected = {
            RADIUS: std * radius.square().sum().sqrt(),
            RELATIVE: std * radius.norm() / t.norm(),
            SPREAD: drawn.std(dim=0),
            ENTROPY: -(p * p.log()).nansum(),
            COSINE: -torch.cosine_similarity(t[0], video[0, 0], dim=-1),
            MARGIN: second - first,
        }
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(float(value), rel=1e-3, abs=1e-5), name


def test_the_length_of_the_noise_is_that_of_its_draws(scored):
    model, text, frames, owner, *_ = scored
    for prior, std in (("normal", 0.7), ("uniform", 1.0)):
        ratio = noise_ratio(model, text, frames, owner, prior=prior, std=std)
        eps = noise_bank(20_000, DIM, 1, prior, std)
        with torch.no_grad():
            radius = model.radius(text, frames, model.fusion(text, frames))[torch.arange(TEXTS), owner]
            squares = radius.square() @ eps.square().mean(dim=0)
        assert ratio == pytest.approx((squares.sqrt() / text.norm(dim=-1)).mean().item(), rel=0.02)


def test_without_a_mass_there_is_no_radius_and_the_rest_stays(scored):
    model = random_model("xpool", frames=FRAMES)
    found = query_results(model, *scored[1:])
    assert not {RADIUS, RELATIVE, SPREAD} & found.keys() and {ENTROPY, COSINE, MARGIN} <= found.keys()


# ------------------------------------------------------------------------------------------------- complexity


def results(hits: np.ndarray, owner: np.ndarray, **more) -> dict[int, dict]:
    """Results of as many seeds as hits has rows."""
    line = " ".join(map(str, owner))
    return {
        seed: {"owner": line, "queries": written({"t2v R@1": row, **more})} for seed, row in enumerate(hits)
    }


def test_groups_equal_their_loops_and_the_trend_is_the_difference_of_gains():
    owner, group = np.repeat(np.arange(30), 4), RNG.integers(3, size=30)
    a, b = (100.0 * (RNG.random((5, 120)) < p) for p in (0.4, 0.6))
    found = by_group({"a": results(a, owner), "b": results(b, owner)}, "t2v R@1", group, THIRDS)
    means = {"a": [], "b": []}
    for number, label in enumerate(THIRDS):
        own = [query for query in range(120) if group[owner[query]] == number]
        for row, hits in (("a", a), ("b", b)):
            expected = {seed: hits[seed, own].mean() for seed in range(5)}
            assert found[row]["values"][label] == pytest.approx(expected)
            means[row].append(hits[:, own].mean())
    gains = [found["b"]["gains"][label] for label in THIRDS]
    assert [gain["mean"] for gain in gains] == pytest.approx(np.subtract(means["b"], means["a"]))
    trend = found["b"]["gains"][TREND]
    assert trend["mean"] == pytest.approx(gains[2]["mean"] - gains[0]["mean"])
    assert trend["clips"][0] < trend["mean"] < trend["clips"][1] and trend["seeds"] == 5
    assert found["a"]["gains"] == {}


def test_a_group_without_a_query_has_no_value_and_no_gain():
    owner, group = np.repeat(np.arange(6), 2), np.array([0, 0, 2, 2, 2, 2])
    rows = {name: results(100.0 * (RNG.random((2, 12)) < 0.5), owner) for name in "ab"}
    found = by_group(rows, "t2v R@1", group, THIRDS)["b"]
    assert found["values"]["middle third"] == {} and found["gains"]["middle third"] is None


def test_thirds_are_equal_parts_in_order():
    values = RNG.random(300)
    third = thirds(values)
    assert np.bincount(third).tolist() == [100, 100, 100]
    assert values[third == 0].max() < values[third == 1].min() < values[third == 2].min()


def test_shares_of_first_answers_add_up():
    group, answers = np.array([0, 0, 1, 2]), np.array([3, 3, 2, 0, 1, 3, 3, 3])
    found = first_answers({"a": results(np.zeros((2, 8)), np.zeros(8, int), answer=answers)}, group, THIRDS)
    assert found["clips"] == dict(zip(THIRDS, ([50.0], [25.0], [25.0])))
    assert found["a"] == {"low third": [25.0] * 2, "middle third": [12.5] * 2, "high third": [62.5] * 2}


def test_complexity_finds_a_gain_that_grows_with_the_number_of_scenes():
    clips, scenes = 60, np.arange(60) % 5 + 1
    owner = np.repeat(np.arange(clips), 5)
    base, more = 100.0 * (RNG.random((3, 300)) < 0.3), 0.3 + 0.1 * (scenes[owner] - 1)
    better, names = 100.0 * (RNG.random((3, 300)) < more), ("t2v R@10", "v2t R@1", "v2t R@10")
    blank = dict(answer=owner, dispersion=RNG.random(clips), fitting=np.full(300, 2))
    blank |= {name: np.zeros(clips if name[0] == "v" else 300) for name in names}
    rows = {"X-Pool": results(base, owner, **blank), "T-MASS": results(better, owner, **blank)}
    content, text = complexity(rows, rows, scenes)
    assert content["scenes"]["t2v R@1"]["T-MASS"]["gains"][TREND]["clips"][0] > 20
    low, high = content["dispersion"]["t2v R@1"]["T-MASS"]["gains"][TREND]["clips"]
    assert low < 0 < high
    assert set(content["scenes"]["perfect retriever"].values()) == {50.0}
    assert "| t2v R@1 by number of scenes of the clip | 1 scene | 2 scenes |" in text
    assert complexity({"X-Pool": {}}, {"X-Pool": {}}, None) == ({}, "")


# ------------------------------------------------------------------------------------------------ uncertainty


def test_levels_are_deciles_and_agree_with_scipy():
    uncertain = RNG.random(430)
    hits = 100.0 * (RNG.random(430) > 0.3 + 0.4 * uncertain)
    found, order = levels(uncertain, hits), np.argsort(uncertain)
    bins = [hits[part].mean() for part in np.array_split(order, 10)]
    assert found["levels"] == pytest.approx(bins)
    line = scipy.stats.linregress(np.arange(10), bins)
    S = scipy.stats.spearmanr(np.arange(10), bins).statistic
    assert (found["S"], found["R2"]) == pytest.approx((S, line.rvalue**2))
    assert found["-S R2"] == pytest.approx(-S * line.rvalue**2) and found["-S R2"] > 0.3


def test_an_uncertainty_that_is_a_line_is_best_and_one_that_says_nothing_is_none():
    uncertain = np.repeat(np.arange(10.0), 100)
    hits = np.concatenate([np.repeat([100.0, 0.0], (95 - 10 * k, 5 + 10 * k)) for k in range(10)])
    assert levels(uncertain, hits)["-S R2"] == pytest.approx(1)
    assert levels(-uncertain, hits)["-S R2"] == pytest.approx(-1)
    nothing = levels(np.ones(1000), hits) | rejection(np.ones(1000), hits)
    assert nothing["-S R2"] == 0 and nothing["rejection"] == pytest.approx([hits.mean()] * 20)


def test_rejection_by_a_perfect_uncertainty_is_monotone_and_above_every_other():
    hits = 100.0 * (RNG.random(500) < 0.4)
    perfect, other = rejection(-hits, hits), rejection(RNG.random(500), hits)
    assert perfect["rejection"][0] == pytest.approx(hits.mean()) == other["rejection"][0]
    assert np.all(np.diff(perfect["rejection"]) >= 0) and perfect["rejection"][-1] == 100
    assert all(p >= o - 1e-9 for p, o in zip(perfect["rejection"], other["rejection"]))
    assert rejection(hits, hits)["area"] < other["area"] < perfect["area"]


def test_no_number_depends_on_the_order_of_the_queries():
    uncertain = np.round(RNG.random(200), 1)  # many are equal
    hits, order = 100.0 * (RNG.random(200) < 0.5), RNG.permutation(200)
    one, two = (
        levels(u, h) | rejection(u, h) for u, h in ((uncertain, hits), (uncertain[order], hits[order]))
    )
    assert all(np.allclose(one[name], two[name]) for name in one)


def test_uncertainty_is_summed_up_for_each_row_and_seed():
    hits, fitting = 100.0 * (RNG.random((2, 300)) < 0.4), RNG.integers(1, 9, 300)
    rows = {"X-Pool": results(hits, np.arange(300), fitting=fitting, **{COSINE: fitting * 0.1})}
    content, text = uncertainty(rows | {"T-MASS": {}})
    assert content["T-MASS"] == {} and content["X-Pool"][COSINE][1]["fitting"] == pytest.approx(1)
    assert set(content["X-Pool"]) == {COSINE, "best possible", "none"}
    assert content["X-Pool"]["none"][0]["area"] == pytest.approx(hits[0].mean())
    assert len(text.splitlines()) == 2 + 3
