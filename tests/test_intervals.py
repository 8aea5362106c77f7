"""Intervals of a paired difference: over seeds, over seeds and clips."""

import numpy as np
import pytest

from engine.intervals import over_seeds_and_clips

SEEDS, CLIPS = 6, 90


def differences(between_seeds: float, between_clips: float, queries: int = 1, seed: int = 0):
    """Values (seeds, queries) around 0, a baseline of zeros, and the clip of each query."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, between_seeds, (SEEDS, 1)) + rng.normal(0, between_clips, (1, CLIPS))
    values = np.repeat(values, queries, axis=1)
    return values, np.zeros_like(values), np.repeat(np.arange(CLIPS), queries)


def width(*arguments) -> float:
    low, high = over_seeds_and_clips(*arguments)
    return high - low


def test_equal_runs_differ_by_nothing():
    values, _, clip = differences(1, 1)
    assert over_seeds_and_clips(values, values, clip) == (0, 0)


@pytest.mark.parametrize("between_seeds, between_clips", [(2.0, 0.0), (0.0, 5.0), (2.0, 5.0)])
def test_both_sources_of_variance_count(between_seeds, between_clips):
    """The width is that of a normal mean whose variance has a part of the seeds and one of the clips."""
    values, zeros, clip = differences(between_seeds, between_clips)
    variance = values.mean(axis=1).var() / SEEDS + values.mean(axis=0).var() / CLIPS
    assert width(values, zeros, clip) == pytest.approx(2 * 1.96 * variance**0.5, rel=0.08)


def test_queries_of_one_clip_are_not_independent():
    one, four = differences(0.5, 5), differences(0.5, 5, queries=4)
    assert width(*four) == pytest.approx(width(*one), rel=0.05)


def test_clips_with_more_queries_weigh_more():
    clip = np.repeat(np.arange(CLIPS), np.arange(CLIPS) % 3 + 1)
    values = np.broadcast_to(clip % 3, (SEEDS, len(clip))).astype(float)  # the number of queries, less one
    low, high = over_seeds_and_clips(values, np.zeros_like(values), clip)
    assert low < values.mean() < high and values.mean() > 1.2  # by clips alone it would be 1


def test_it_is_paired_and_does_not_depend_on_the_order_of_queries():
    values, _, clip = differences(1, 3)
    noise = np.random.default_rng(5).normal(0, 50, values.shape)  # the same in both
    order = np.random.default_rng(6).permutation(len(clip))
    expected = over_seeds_and_clips(values, np.zeros_like(values), clip)
    assert over_seeds_and_clips(values + noise, noise, clip) == pytest.approx(expected, abs=1e-6)
    assert over_seeds_and_clips(values[:, order], 0 * values, clip[order]) == pytest.approx(
        expected, abs=1e-9
    )


def test_a_single_clip_is_refused():
    values, zeros, clip = differences(1, 1)
    with pytest.raises(ValueError, match="two clips"):
        over_seeds_and_clips(values, zeros, clip * 0)
