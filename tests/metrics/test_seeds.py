"""Means over seeds against analyses of variance by hand, and against scipy's interval of a mean."""

import numpy as np
import pytest
from scipy import stats

from ldm_jax.metrics.estimate import by_group, mean_estimate
from ldm_jax.metrics.seeds import over_prompts_and_seeds, over_seeds

T_1, T_2 = 12.706205, 4.302653  # Student's, of one and of two degrees of freedom


def students(values):
    return stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))


def half_width(estimate):
    assert estimate.high - estimate.value == pytest.approx(estimate.value - estimate.low)
    return (estimate.high - estimate.low) / 2


def test_effects_that_add_up_are_analysed_by_hand():
    # Seeds' means 2 and 4, prompts' 1, 3 and 5, nothing left: variances of the mean 1 and 4 / 3.
    given = over_prompts_and_seeds(np.array([[0.0, 2, 4], [2, 4, 6]]))
    assert (given.value, given.count) == (3, 6)
    assert half_width(given) == pytest.approx(np.sqrt(T_1**2 * 1 + T_2**2 * 4 / 3), rel=1e-6)


def test_the_rest_counts_once():
    # Means as above, and a rest of +-(1, -1, 0), whose mean square is 4 / 2: of M_prompt / 6 = 4 / 3 it is 1 / 3.
    given = over_prompts_and_seeds(np.array([[1.0, 1, 4], [1, 5, 6]]))
    assert half_width(given) == pytest.approx(np.sqrt(T_1**2 * 1 + T_2**2 * 1), rel=1e-6)


def test_seeds_of_equal_means_leave_the_interval_over_prompts():
    values = np.array([[1.0, 0, 1, 0], [0, 1, 1, 0]])
    assert over_prompts_and_seeds(values)[1:3] == pytest.approx(students(values.mean(axis=0)))


def test_seeds_that_are_all_that_differs_leave_the_interval_over_seeds():
    of_seeds = np.array([1.0, 4.0, 2.0])
    given = over_prompts_and_seeds(np.repeat(of_seeds[:, None], 7, axis=1))
    assert given[:3] == pytest.approx(over_seeds(of_seeds)[:3])
    assert given.count == 21


def test_over_seeds_it_is_students_interval():
    values = np.random.default_rng(0).normal(size=5)
    given = over_seeds(values)
    assert given[1:3] == pytest.approx(students(values))
    assert (given.value, given.count) == (pytest.approx(values.mean()), 5)


def test_one_seed_is_a_mean_over_prompts_and_has_none_over_seeds():
    values = np.random.default_rng(0).normal(size=(1, 30))
    others = np.random.default_rng(1).normal(size=(1, 20))
    assert over_prompts_and_seeds(values) == mean_estimate(values[0])
    assert over_prompts_and_seeds(values, others) == mean_estimate(values[0], others[0])
    alone = over_seeds(np.array([2.0]))
    assert (alone.value, alone.count) == (2, 1) and np.isnan([alone.low, alone.high]).all()


def test_neither_the_order_of_seeds_nor_that_of_prompts_matters():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 20)) + rng.normal(size=(3, 1)) + rng.normal(size=(1, 20))
    shuffled = values[rng.permutation(3)][:, rng.permutation(20)]
    assert over_prompts_and_seeds(shuffled) == pytest.approx(over_prompts_and_seeds(values))


def test_what_a_seed_adds_to_both_groups_is_not_in_their_gap():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=(3, 20)), ["a", "b"] * 10
    moved = values + np.array([[0.0], [50.0], [-20.0]])
    scores = [
        by_group("score", each, groups, estimate=over_prompts_and_seeds) for each in (values, moved)
    ]
    assert scores[1]["score/gap"][1:3] == pytest.approx(scores[0]["score/gap"][1:3])
    assert half_width(scores[1]["score/a"]) > 20 > half_width(scores[0]["score/a"])
    parts = values[:, ::2], values[:, 1::2]
    assert scores[0]["score/gap"].value == pytest.approx(parts[0].mean() - parts[1].mean())
    assert scores[0]["score/b"] == over_prompts_and_seeds(parts[1])


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_no_number_leaves_no_interval(broken):
    values = np.ones((2, 3))
    values[0, 1] = broken
    for given in (over_prompts_and_seeds(values), over_seeds(values[0])):
        assert not np.isfinite(given.value) and np.isnan([given.low, given.high]).all()


def test_one_prompt_has_no_interval():
    given = over_prompts_and_seeds(np.array([[1.0], [3.0]]))
    assert given.value == 2 and np.isnan([given.low, given.high]).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_score_is_an_error(shape):
    with pytest.raises(ValueError, match="at least one"):
        over_prompts_and_seeds(np.zeros(shape))
    with pytest.raises(ValueError, match="at least one"):
        over_seeds(np.zeros(0))
