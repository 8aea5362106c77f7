import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from losses import cosine_scores, symmetric_cross_entropy, tmass_loss

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
    t2v = -sum(math.log(math.exp(scale * scores[i, i]) / sum(math.exp(scale * scores[i, j]) for j in range(N))) for i in range(N)) / N
    v2t = -sum(math.log(math.exp(scale * scores[j, j]) / sum(math.exp(scale * scores[i, j]) for i in range(N))) for j in range(N)) / N
    assert symmetric_cross_entropy(scores, scale).item() == pytest.approx((t2v + v2t) / 2)


def test_cross_entropy_is_symmetric_and_blind_to_the_order_of_the_batch():
    scores, order = randn(N, N), torch.tensor([3, 0, 4, 1, 2])
    loss = symmetric_cross_entropy(scores, 7.0)
    assert torch.allclose(symmetric_cross_entropy(scores.T, 7.0), loss)
    assert torch.allclose(symmetric_cross_entropy(scores[order][:, order], 7.0), loss)
    assert not torch.allclose(symmetric_cross_entropy(scores[order], 7.0), loss)  # another pairing is another loss


def test_matched_pairs_that_score_higher_cost_less():
    better = randn(N, N) + 0.1 * torch.eye(N)
    assert symmetric_cross_entropy(better, 7.0) < symmetric_cross_entropy(randn(N, N), 7.0)


@pytest.mark.parametrize("per_pair", [False, True])
def test_total_is_L_s_plus_alpha_L_sup(per_pair):
    t_s = randn(N, N, DIM, seed=1) if per_pair else randn(N, DIM, seed=1)
    t_sup, video = randn(N, DIM, seed=2), randn(N, N, DIM, seed=3)
    total, parts = tmass_loss(t_s, t_sup, video, 9.0, alpha=0.7)
    assert torch.allclose(parts["L_s"], symmetric_cross_entropy(cosine_scores(t_s, video), 9.0))
    assert torch.allclose(parts["L_sup"], symmetric_cross_entropy(cosine_scores(t_sup, video), 9.0))
    assert torch.allclose(total, parts["L_s"] + 0.7 * parts["L_sup"])
    assert torch.equal(tmass_loss(t_s, t_sup, video, 9.0, alpha=0.0)[0], parts["L_s"])


@pytest.mark.parametrize("per_pair", [False, True])
def test_gradients_equal_finite_differences(per_pair):
    n, dim = 3, 4
    t_s = randn(n, n, dim, seed=1) if per_pair else randn(n, dim, seed=1)
    inputs = [t_s, randn(n, dim, seed=2), randn(n, n, dim, seed=3), torch.tensor(4.0, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: tmass_loss(*x)[0], [x.requires_grad_() for x in inputs])
