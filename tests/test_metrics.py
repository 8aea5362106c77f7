"""Ranks, recall, ties and the table."""

import itertools

import numpy as np
import pytest
import torch
from conftest import randn

from engine.metrics import (
    dual_softmax,
    relevance_metrics,
    retrieval_metrics,
    table,
    text_to_video_ranks,
)

TEXTS, VIDEOS = 7, 5
COLUMNS = ("fits@1", "R-Precision", "mAP@R")


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


def test_table_has_a_row_for_each_run_and_direction_and_at_most_seven_columns():
    metrics = retrieval_metrics(randn(7, 5), torch.tensor([0, 0, 1, 2, 3, 3, 4]))
    known = {**metrics, "t2v": {**metrics["t2v"], "fits@1": 37.5}}
    lines = table({"X-Pool": metrics, "T-MASS, M = 20": known}).splitlines()
    assert len(lines) == 7 and lines[3].count("37.5") == 1 and lines[2].endswith("|        |")
    assert {line.count("|") for line in lines} == {8} and len({len(line) for line in lines}) == 1
    assert "fits@1" not in table({"X-Pool": metrics})  # absent, not zero


# ---- relevance


def relevance_by_hand(scores, relevant) -> dict[str, float]:
    """The three metrics of one order, as ECCV Caption defines them, in loops."""
    fits, precision, average = [], [], []
    for row, fitting in zip(scores.tolist(), relevant.tolist()):
        order = sorted(range(len(row)), key=lambda video: -row[video])
        n = sum(fitting)
        hits = [fitting[video] for video in order]
        fits.append(hits[0])
        precision.append(sum(hits[:n]) / n)
        average.append(sum(sum(hits[: k + 1]) / (k + 1) for k in range(n) if hits[k]) / n)
    means = (100 * np.mean(values) for values in (fits, precision, average))
    return dict(zip(("fits@1", "R-Precision", "mAP@R"), means))


RELEVANT = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]]).bool()


def test_relevance_metrics_equal_their_definition_in_loops():
    s = randn(4, 5)
    assert relevance_metrics(s, RELEVANT) == pytest.approx(relevance_by_hand(s, RELEVANT))
    assert relevance_metrics(RELEVANT.float(), RELEVANT) == pytest.approx(dict.fromkeys(COLUMNS, 100))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_tied_scores_count_as_the_mean_over_all_their_orders(levels):
    s = (randn(4, 5).argsort(dim=1) % levels).float()
    orders = [s + 1e-3 * torch.tensor(order) for order in itertools.permutations(range(5))]
    by_hand = [relevance_by_hand(order, RELEVANT) for order in orders]
    mean = {name: np.mean([found[name] for found in by_hand]) for name in by_hand[0]}
    assert relevance_metrics(s, RELEVANT) == pytest.approx(mean)


def test_texts_that_nothing_fits_are_left_out_of_relevance():
    s, none = randn(5, 5), torch.zeros(1, 5, dtype=torch.bool)
    assert relevance_metrics(s, torch.cat([RELEVANT, none])) == relevance_metrics(s[:4], RELEVANT)


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
