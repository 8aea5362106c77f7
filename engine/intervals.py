"""Intervals of a paired difference: over seeds, and over seeds and clips together ("Experiments").

Runs differ by their seed, test sets by their clips. An interval over seeds alone says nothing about other
clips, and one over clips alone nothing about other runs.
"""

import math
import statistics
from collections.abc import Mapping

import numpy as np
import scipy  # its stats are loaded when they are used
from jaxtyping import Float, Int


def over_seeds(values: Mapping[int, float], baseline: Mapping[int, float]) -> dict | None:
    """Returns {"mean", "half", "seeds"} of values - baseline over the n seeds of both; None if n = 0.

    The 95 % confidence interval is mean +- half with half = t_{n-1} std / sqrt(n), None if n = 1. It is over
    seeds and says nothing about other test sets."""
    differences = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    n = len(differences)
    if n == 0:
        return None
    half = scipy.stats.t.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else None
    return {"mean": statistics.mean(differences), "half": half, "seeds": n}


def over_seeds_and_clips(
    values: Float[np.ndarray, "seeds queries"],
    baseline: Float[np.ndarray, "seeds queries"],
    clip: Int[np.ndarray, " queries"],
    repeats: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the 95 % interval of mean(values - baseline), from a bootstrap over seeds and clips.

    values, baseline: a number of each run and query, such as 100 for a hit, 0 for a miss; the same seed and
    query stand at the same place in both, so the difference is paired. clip: the clip of each query. Each
    repeat draws as many seeds and as many clips as there are, with replacement; all seeds share the clips
    drawn, and a clip brings all its queries. With few seeds the interval is somewhat too narrow.
    Raises ValueError for fewer than two clips."""
    clips, number = np.unique(clip, return_inverse=True)
    if len(clips) < 2:
        raise ValueError("an interval over clips needs two clips or more.")
    of_clip = np.zeros((len(clips), len(number)))
    of_clip[number, np.arange(len(number))] = 1
    sums, counts = (values - baseline) @ of_clip.T, of_clip.sum(axis=1)  # (seeds, clips), (clips,)
    rng = np.random.default_rng(seed)

    def drawn(n: int) -> Float[np.ndarray, "repeats n"]:
        """How often each of n things is drawn in each repeat."""
        return rng.multinomial(n, np.full(n, 1 / n), size=repeats).astype(float)

    seeds, again = drawn(len(sums)) / len(sums), drawn(len(clips))
    means = ((seeds @ sums) * again).sum(axis=1) / (again @ counts)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
