"""The batches of an epoch where clips have unequal numbers of captions: all of one size."""

from collections import deque
from collections.abc import Sequence

import numpy as np


def plan_batches(counts: Sequence[int], batch_size: int) -> tuple[int, int]:
    """The size of an epoch's batches, and the greatest possible number, for clips with `counts` captions.

    K batches of `size` different clips exist if sum_c min(counts[c], K) >= K size. The size is batch_size, or
    the number of clips if that is less. It is smaller, down to a half, only where the epoch can then use more
    than 1.5 times as many captions. For a clip with 60 captions and nine with one, batch_size 8: one batch of
    8. For 29 clips with five captions and one with one, batch_size 32: five batches of 29, not one of 30."""
    clips_left = len(counts) - np.cumsum(np.bincount(counts))[:-1]  # that have more than 0, 1, 2 ... captions
    within = np.cumsum(clips_left)  # sum_c min(counts[c], K) for K = 1, 2 ...
    full, total = min(batch_size, int(clips_left[0])), int(within[-1])

    def number(size: int) -> int:
        if total // size >= len(within):
            return total // size
        return int((within >= size * np.arange(1, len(within) + 1)).sum())

    least = min(full, max(2, (full + 1) // 2))  # a single pair has no loss
    plans = [(size, number(size)) for size in range(full, least - 1, -1)]
    most = max(size * batches for size, batches in plans)
    return next((size, batches) for size, batches in plans if 3 * size * batches >= 2 * most)


def deal_batches(
    order: Sequence[np.ndarray], batch_size: int, rng: np.random.Generator
) -> list[list[tuple[int, int]]]:
    """The batches of `plan_batches`, as (clip, caption) numbers. order: each clip's captions, shuffled.

    The clips, in random order, deal their captions to the batches, which take one each in turn, in a new
    random order every time. So a clip meets other clips with each of its captions."""
    size, number = plan_batches([len(captions) for captions in order], batch_size)
    batches: list[list[tuple[int, int]]] = [[] for _ in range(number)]
    queue: deque[int] = deque()  # the batches that take the next captions
    for clip in rng.permutation(len(order)):
        captions = order[clip][:number]
        if len(queue) < len(captions):
            turn, waiting = rng.permutation(number).tolist(), set(queue)
            queue.extend(batch for batch in turn if batch not in waiting)
            queue.extend(batch for batch in turn if batch in waiting)  # last: not two captions of this clip
        for caption in captions:
            batches[queue.popleft()].append((int(clip), int(caption)))
    return [batch[:size] for batch in batches]
