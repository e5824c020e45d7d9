"""The frontier has what nothing cheaper beats, and each stretch of it one owner."""

import math

import numpy as np
import pytest

from ldm_jax.studies.pareto import best_within, frontier, stretches


def dominated(cost, score, i):
    """By the definition (Pareto): another point is at least as good in both, and better in one."""
    return any(
        cost[j] <= cost[i]
        and score[j] >= score[i]
        and (cost[j] < cost[i] or score[j] > score[i] or j < i)
        for j in range(len(cost))
        if j != i
    )


@pytest.mark.parametrize("seed", range(20))
def test_frontier_is_what_no_point_dominates(seed):
    rng = np.random.default_rng(seed)
    cost, score = rng.integers(1, 12, 30).astype(float), rng.integers(0, 9, 30).astype(float)
    found = frontier(cost, score)
    assert set(found) == {i for i in range(30) if not dominated(cost, score, i)}
    assert np.all(np.diff(cost[found]) > 0)
    assert np.all(np.diff(score[found]) > 0)


def test_score_that_is_not_a_number_is_on_no_frontier():
    assert frontier(np.array([1.0, 2.0]), np.array([np.nan, 0.1])).tolist() == [1]


def test_budget_buys_the_best_of_what_it_pays_for():
    cost, scores = np.array([3.0, 1.0, 2.0]), np.array([[9.0, 1.0, 0.5], [9.0, 1.0, 4.0]])
    found = best_within(cost, scores, np.array([1.0, 2.5, 3.0]))
    assert found.tolist() == [[1, 1, 0], [1, 2, 0]]


def test_budget_below_the_cheapest_is_refused():
    with pytest.raises(
        ValueError, match=r"a budget of 0\.5 pays for nothing: the cheapest costs 1"
    ):
        best_within(np.array([1.0, 2.0]), np.array([1.0, 2.0]), np.array([0.5]))


def test_stretches_cover_all_costs_and_count_who_agrees():
    cost, owners = np.array([1.0, 2.0, 4.0, 8.0]), np.array([0, 0, 1, 1])
    scores = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 3.5, 3, 4], [1, 2, 3, 4], [1, 2, 3, 1]])
    small, large = stretches(cost, scores, owners)
    assert small == (1.0, 4.0, 0, 1.0)
    assert large == (4.0, math.inf, 1, 0.75)
    assert math.isnan(stretches(cost, scores[0], owners)[0].share)
