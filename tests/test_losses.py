"""Losses equal their loops, their limits and finite differences."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from losses import LOSSES, cosine_scores, symmetric_cross_entropy, tmass_loss

N, VIDEOS, DIM = 5, 3, 8


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("per_pair", [False, True])
def test_cosine_scores_equal_their_loop(per_pair):
    text, video = randn(N, VIDEOS, DIM) if per_pair else randn(N, DIM), randn(N, VIDEOS, DIM, seed=1)
    scores = cosine_scores(text, video)
    for i in range(N):
        for j in range(VIDEOS):
            expected = cosine_similarity(text[i, j] if per_pair else text[i], video[i, j], dim=0)
            assert torch.allclose(scores[i, j], expected)


def test_cosine_scores_ignore_length():
    text, video = randn(N, DIM), randn(N, VIDEOS, DIM, seed=1)
    assert torch.allclose(cosine_scores(3 * text, 0.1 * video), cosine_scores(text, video))


def test_constant_scores_cost_log_n():
    assert symmetric_cross_entropy(torch.full((N, N), 0.3), 50.0).item() == pytest.approx(math.log(N))


def test_cross_entropy_equals_its_loop():
    scores, scale = randn(N, N), 7.0
    e = [[math.exp(scale * scores[i, j]) for j in range(N)] for i in range(N)]
    t2v = -sum(math.log(e[i][i] / sum(e[i][j] for j in range(N))) for i in range(N)) / N
    v2t = -sum(math.log(e[j][j] / sum(e[i][j] for i in range(N))) for j in range(N)) / N
    assert symmetric_cross_entropy(scores, scale).item() == pytest.approx((t2v + v2t) / 2)


def test_cross_entropy_is_symmetric_and_blind_to_the_order_of_the_batch():
    scores, order = randn(N, N), torch.tensor([3, 0, 4, 1, 2])
    loss = symmetric_cross_entropy(scores, 7.0)
    assert torch.allclose(symmetric_cross_entropy(scores.T, 7.0), loss)
    assert torch.allclose(symmetric_cross_entropy(scores[order][:, order], 7.0), loss)
    assert not torch.allclose(
        symmetric_cross_entropy(scores[order], 7.0), loss
    )  # another pairing is another loss


def test_matched_pairs_that_score_higher_cost_less():
    better = randn(N, N) + 0.1 * torch.eye(N)
    assert symmetric_cross_entropy(better, 7.0) < symmetric_cross_entropy(randn(N, N), 7.0)


def batch(n: int = N, dim: int = DIM) -> dict[str, torch.Tensor]:
    """What tmass_loss takes."""
    text, video = randn(n, dim), randn(n, n, dim, seed=3)
    return dict(
        text=text,
        video=video,
        t_sup=randn(n, dim, seed=2),
        mass_scores=cosine_scores(randn(n, dim, seed=1), video),
    )


def weights_of(**weights: float) -> dict[str, float]:
    """Weights for all losses: 0 for those that are not given."""
    return {**dict.fromkeys(LOSSES, 0.0), **weights}


def test_total_is_the_weighted_sum_of_its_parts():
    x, weights = batch(), weights_of(L_s=1.0, L_sup=0.7, L_ce=0.5)
    total, parts = tmass_loss(weights, scale=9.0, **x)
    assert torch.equal(parts["L_s"], symmetric_cross_entropy(x["mass_scores"], 9.0))
    assert torch.equal(parts["L_sup"], symmetric_cross_entropy(cosine_scores(x["t_sup"], x["video"]), 9.0))
    assert torch.equal(parts["L_ce"], symmetric_cross_entropy(cosine_scores(x["text"], x["video"]), 9.0))
    assert torch.allclose(total, sum(weights[name] * part for name, part in parts.items()))


def test_a_loss_of_weight_zero_is_left_out_and_needs_none_of_its_symbols():
    x = batch()
    total, parts = tmass_loss(weights_of(L_ce=1.0), scale=9.0, text=x["text"], video=x["video"])
    assert set(parts) == {"L_ce"} and torch.equal(total, parts["L_ce"])


@pytest.mark.parametrize(
    "weights",
    [{name: 1.0 for name in LOSSES if name != "L_ce"}, {**dict.fromkeys(LOSSES, 1.0), "L_new": 1.0}],
)
def test_every_loss_has_a_weight_and_every_weight_a_loss(weights):
    with pytest.raises(ValueError, match=r"differ in L_(ce|new)"):
        tmass_loss(weights, scale=9.0, **batch())


def test_a_registered_loss_counts(monkeypatch):
    monkeypatch.setitem(LOSSES, "L_toy", lambda text, **_: text.square().mean())
    x, weights = batch(), weights_of(L_s=1.0, L_toy=2.0)
    total, parts = tmass_loss(weights, scale=9.0, **x)
    assert torch.equal(parts["L_toy"], x["text"].square().mean())
    assert torch.allclose(total, parts["L_s"] + 2 * parts["L_toy"])


def test_gradients_equal_finite_differences():
    x = batch(n=3, dim=4)
    scale, weights = torch.tensor(4.0, dtype=torch.float64), weights_of(L_s=1.0, L_sup=0.7, L_ce=0.5)

    def total(scale, *tensors):
        return tmass_loss(weights, scale=scale, **dict(zip(x, tensors)))[0]

    assert torch.autograd.gradcheck(total, [tensor.requires_grad_() for tensor in (scale, *x.values())])
