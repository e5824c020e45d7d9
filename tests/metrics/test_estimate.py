"""Intervals against their stated coverage."""

import numpy as np
import pytest

from ldm_jax.metrics.estimate import by_group, mean_estimate


def test_the_interval_covers_the_truth_at_its_stated_rate():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        estimate = mean_estimate(rng.normal(3.0, 1.0, 60))
        covered += estimate.low <= 3.0 <= estimate.high
    # 95% of 200 with a binomial standard deviation of 3; a percentile bootstrap of 60 is a little narrow.
    assert 176 <= covered <= 199


def test_the_interval_is_that_of_the_normal_law_for_many_values():
    values = np.random.default_rng(1).normal(0.0, 2.0, 2000)
    estimate = mean_estimate(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose(
        [estimate.value - estimate.low, estimate.high - estimate.value], half, rtol=0.1
    )


def test_what_is_no_number_is_not_left_out_of_a_mean():
    scores = by_group("score", np.array([1.0, np.nan, 3.0, 4.0]), ["a", "a", "b", "b"])
    values = {name: score.value for name, score in scores.items()}
    assert np.isnan([values.pop(name) for name in ("score", "score/a", "score/gap")]).all()
    assert values == {"score/b": 3.5}


def test_equal_values_have_no_width_and_one_value_no_interval():
    assert mean_estimate(np.full(5, 0.25)) == (0.25, 0.25, 0.25, 5)
    assert np.isnan(mean_estimate(np.array([1.0])).low)


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="at least one prompt"):
        mean_estimate(np.array([]))


def test_groups_are_means_of_their_own_and_the_gap_is_their_difference():
    values, groups = np.array([1.0, 2.0, 3.0, 8.0]), ["a", "b", "a", "b"]
    scores = by_group("score", values, groups)
    assert {name: score.value for name, score in scores.items()} == {
        "score": 3.5,
        "score/a": 2.0,
        "score/b": 5.0,
        "score/gap": -3.0,
    }
    assert scores["score/gap"].low < -3.0 < scores["score/gap"].high


def test_an_infinite_value_makes_the_mean_infinite_and_has_no_interval():
    estimate = mean_estimate(np.array([1.0, np.inf, 2.0]))
    assert estimate.value == np.inf and np.isnan([estimate.low, estimate.high]).all()
