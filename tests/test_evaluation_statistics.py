"""Estimates against hand-computed cases and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm2_fast.evaluation.statistics import (
    bootstrap_means,
    interval,
    majority,
    mcnemar,
    mean_over_groups,
    pass_at_k,
    sample_counts,
)


@pytest.mark.parametrize(("n", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_sample_counts(n, counts):
    assert sample_counts(n) == counts


@pytest.mark.parametrize(
    ("n", "right", "k", "expected"),
    [(1, 0, 1, 0.0), (1, 1, 1, 1.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6), (4, 3, 2, 1.0), (5, 0, 5, 0.0)],
)
def test_pass_at_k_by_hand(n, right, k, expected):
    assert pass_at_k(n, right, k) == pytest.approx(expected)


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(samples, data):
    k = data.draw(st.integers(1, len(samples)))
    subsets = list(itertools.combinations(samples, k))
    assert pass_at_k(len(samples), sum(samples), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([], None),
        ([None, None], None),
        ([0], 0),
        ([None, 1, None], 1),
        ([0, 1, 1], 1),
        ([0, 1, 1, 0], 0),  # a tie: the answer that came first
        ([7, 3, 3, 7, None], 0),
        ([0, None, 2, 2, 0, 2], 2),
    ],
)
def test_majority_by_hand(votes, expected):
    assert majority(votes) == expected


@given(st.lists(st.none() | st.integers(0, 3), max_size=9))
def test_majority_has_most_votes_and_came_first(votes):
    chosen = majority(votes)
    cast = [vote for vote in votes if vote is not None]
    if chosen is None:
        assert cast == []
        return
    best = max(map(cast.count, cast))
    assert cast.count(votes[chosen]) == best
    assert all(vote is None or cast.count(vote) < best for vote in votes[:chosen])


def test_groups_are_disjoint_and_whole():
    seen = []
    assert mean_over_groups(7, 3, lambda group: bool(seen.append(list(group))) or group[0] == 3) == 0.5
    assert seen == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (8, 1, 20 / 512), (1, 8, 20 / 512), (3, 3, 1.0)],
)
def test_mcnemar_by_hand(wins, losses, p_value):
    assert mcnemar(wins, losses) == pytest.approx(p_value)


def test_mcnemar_of_many_problems():
    assert mcnemar(5050, 4950) == pytest.approx(math.erfc(99 / math.sqrt(2 * 10_000)), rel=1e-3)  # the normal limit


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_counts_outcomes_as_extreme(wins, losses):
    """Every assignment of the discordant problems is as probable; those as far from even count."""
    discordant = wins + losses
    as_extreme = sum(
        math.comb(discordant, i) for i in range(discordant + 1) if abs(2 * i - discordant) >= abs(wins - losses)
    )
    assert mcnemar(wins, losses) == pytest.approx(as_extreme / 2**discordant)


def test_bootstrap_resamples_problems_in_pairs():
    draw = np.random.default_rng(0)
    values = draw.random((40, 2))
    values = np.column_stack([values, values[:, 0], values[:, 0] + 0.25, np.ones(40)])
    means = bootstrap_means(values, seed=3)
    assert means.shape == (10_000, 5)
    assert np.array_equal(means, bootstrap_means(values, seed=3))
    assert not np.array_equal(means, bootstrap_means(values, seed=4))
    assert np.array_equal(means[:, 0], means[:, 2])
    assert interval(means[:, 3] - means[:, 0]) == pytest.approx((0.25, 0.25))
    assert interval(means[:, 4]) == (1.0, 1.0)
    low, high = interval(means[:, 0])  # close to the normal interval of a mean
    error = values[:, 0].std() / math.sqrt(len(values))
    assert low == pytest.approx(values[:, 0].mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values[:, 0].mean() + 1.96 * error, abs=0.2 * error)


def test_bootstrap_of_two_problems_by_hand():
    """Of the problems 0 and 1 a resample has 0, 1 or 2 times the second: with probability 1/4, 1/2, 1/4."""
    means = bootstrap_means(np.array([[0.0], [1.0]]), seed=0)[:, 0]
    shares = [float((means == value).mean()) for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_bootstrap_draws_what_was_asked_for():
    assert bootstrap_means(np.zeros((3, 1)), seed=0, num_resamples=1).shape == (1, 1)
    assert bootstrap_means(np.zeros((3, 1)), seed=0, num_resamples=501).shape == (501, 1)
