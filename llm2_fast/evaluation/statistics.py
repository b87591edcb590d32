"""Estimates and how far they can be trusted: pass@k, majority votes, paired bootstrap, McNemar's test."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95  # of every interval
NUM_RESAMPLES = 10_000
_BLOCK = 500  # resamples drawn together


class Interval(NamedTuple):
    """Bounds of the middle `CONFIDENCE` of a bootstrap distribution."""

    low: float
    high: float


def sample_counts(n: int) -> list[int]:
    """The k of pass@k and its like for `n` samples: powers of two, and n."""
    return [*(2**i for i in range((n - 1).bit_length())), n]


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that one of `k` samples, drawn from `n` of which `right` are right, is right.

    Without bias as an estimate of pass@k (Chen et al., arXiv 2107.03374, equation 1): 1 - C(n - right, k) / C(n, k).
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def mean_over_groups(n: int, k: int, is_right: Callable[[range], bool]) -> float:
    """Share of the disjoint groups of `k` consecutive samples, `n // k` of them, for which `is_right` holds."""
    groups = [range(start, start + k) for start in range(0, n - k + 1, k)]
    return sum(map(is_right, groups)) / len(groups)


def majority(votes: Sequence[int | None]) -> int | None:
    """Index of the first vote for the answer that most vote for; None if there is no vote.

    Of answers with equally many votes that which was voted for first wins.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    return votes.index(max(counts, key=counts.__getitem__)) if counts else None  # max keeps the first of equals


def bootstrap_means(values: np.ndarray, seed: int, num_resamples: int = NUM_RESAMPLES) -> np.ndarray:
    """Means over problems drawn with replacement, the same problems for every column: differences are paired.

    Args:
        values: float [num_problems, num_columns].
        seed: Of the draws.
        num_resamples: Rows of the result.

    Returns:
        float64 [num_resamples, num_columns].
    """
    count = len(values)
    draw = np.random.default_rng(seed)
    means = []
    for start in range(0, num_resamples, _BLOCK):
        rows = min(_BLOCK, num_resamples - start)
        drawn = draw.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        means.append(times @ values / count)
    return np.concatenate(means)


def interval(means: np.ndarray) -> Interval:
    """The percentile interval of one column of `bootstrap_means`, or of the difference of two."""
    tail = (1 - CONFIDENCE) / 2
    return Interval(*(float(bound) for bound in np.quantile(means, [tail, 1 - tail])))


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided p-value of McNemar's exact test.

    Args:
        wins: Problems that only the first arm has right.
        losses: Problems that only the second has right.
    """
    discordant = wins + losses
    ways = tail = 1  # C(discordant, i), and the sum of those up to i
    for i in range(min(wins, losses)):
        ways = ways * (discordant - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**discordant)
