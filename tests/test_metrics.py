"""Ranks, recall, ties and the table."""

import numpy as np
import pytest
import torch
from conftest import randn

from engine.metrics import dual_softmax, retrieval_metrics, table, text_to_video_ranks

TEXTS, VIDEOS = 7, 5


def test_metrics_equal_sorting_by_hand():
    s, owner = randn(7, 5).numpy(), [0, 0, 1, 3, 3, 3, 4]  # video 2 has no caption
    t2v = [1 + int((row > row[o]).sum()) for row, o in zip(s, owner)]
    v2t = []
    for video in (0, 1, 3, 4):
        order = np.argsort(-s[:, video])
        v2t.append(1 + next(k for k, i in enumerate(order) if owner[i] == video))
    metrics = retrieval_metrics(torch.tensor(s), torch.tensor(owner))
    for name, ranks in {"t2v": t2v, "v2t": v2t}.items():
        for k in (1, 5, 10, 50):
            assert metrics[name][f"R@{k}"] == pytest.approx(100 * np.mean(np.array(ranks) <= k))
        assert metrics[name]["MdR"] == pytest.approx(np.median(ranks))
        assert metrics[name]["MnR"] == pytest.approx(np.mean(ranks))


def test_perfect_scores_rank_first_and_reversed_ones_last():
    owner = torch.arange(VIDEOS)
    best = {"R@1": 100, "R@5": 100, "R@10": 100, "R@50": 100, "MdR": 1, "MnR": 1}
    assert retrieval_metrics(torch.eye(VIDEOS), owner)["t2v"] == best
    worst = retrieval_metrics(-torch.eye(VIDEOS), owner)
    assert worst["t2v"]["MnR"] == worst["v2t"]["MnR"] == VIDEOS


def test_constant_scores_rank_at_chance_not_first():
    metrics = retrieval_metrics(torch.zeros(3 * VIDEOS, VIDEOS), torch.arange(VIDEOS).repeat_interleave(3))
    assert metrics["t2v"]["MnR"] == (VIDEOS + 1) / 2 and metrics["t2v"]["R@1"] == 0
    assert metrics["v2t"]["MnR"] == (3 * VIDEOS + 1) / 4  # the best of 3 captions among 15, in expectation


def test_ties_rank_at_their_expected_place_over_random_orders():
    s, owner = torch.tensor([[2.0, 1, 1, 1, 0]]), torch.tensor([2])
    assert retrieval_metrics(s, owner)["t2v"]["MnR"] == 3  # one above, three level: ranks 2, 3, 4


def test_metrics_do_not_depend_on_the_order_of_texts_and_videos():
    s, owner = randn(7, 5), torch.tensor([0, 0, 1, 2, 3, 3, 4])
    texts, videos = torch.randperm(7), torch.randperm(5)
    inverse = videos.argsort()
    permuted = retrieval_metrics(s[texts][:, videos], inverse[owner[texts]])
    assert permuted["t2v"] == pytest.approx(retrieval_metrics(s, owner)["t2v"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad):
    s = randn(TEXTS, VIDEOS)
    s[2, 1] = bad
    with pytest.raises(ValueError, match="1 of 35 scores are NaN or infinite"):
        retrieval_metrics(s, torch.zeros(TEXTS, dtype=torch.long))


def test_table_has_a_row_for_each_run_and_is_markdown():
    metrics = retrieval_metrics(randn(7, 5), torch.tensor([0, 0, 1, 2, 3, 3, 4]))
    lines = table({"X-Pool": metrics, "T-MASS, M = 20": metrics}).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == len({len(line) for line in lines}) == 1


def test_ranks_are_those_of_the_metrics():
    s, owner = randn(7, 5), torch.tensor([0, 0, 1, 2, 3, 3, 4])
    ranks = text_to_video_ranks(s, owner)
    assert ranks.mean().item() == pytest.approx(retrieval_metrics(s, owner)["t2v"]["MnR"])


def test_dual_softmax_is_each_score_times_its_share_of_the_column():
    s = randn(TEXTS, VIDEOS)
    for i in range(TEXTS):
        for j in range(VIDEOS):
            share = torch.exp(5.0 * s[i, j]) / torch.exp(5.0 * s[:, j]).sum()
            assert torch.allclose(dual_softmax(s, 5.0)[i, j], s[i, j] * share)
