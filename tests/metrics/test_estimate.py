"""Intervals against their stated coverage."""

import numpy as np
import pytest
from scipy import stats

from ldm_jax.metrics.estimate import by_group, mean_estimate, share_estimate


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


def ones(hits, count):
    return np.repeat([1.0, 0.0], [hits, count - hits])


@pytest.mark.parametrize("hits", [0, 1, 17, 39, 40])
def test_the_interval_of_a_share_is_scipys_of_wilson(hits):
    low, high = stats.binomtest(hits, 40).proportion_ci(0.95, method="wilson")
    expected = hits / 40, low, high, 40
    assert share_estimate(ones(hits, 40)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("count", [64, 200, 500])
def test_the_interval_of_a_share_covers_it_by_the_sum_over_all_outcomes(count):
    bounds = np.array([share_estimate(ones(hits, count))[1:3] for hits in range(count + 1)])
    shares = np.linspace(1 / count, 1 - 1 / count, 999)
    inside = (bounds[:, :1] <= shares[None]) & (shares[None] <= bounds[:, 1:])
    weights = stats.binom.pmf(np.arange(count + 1)[:, None], count, shares[None])
    covered = np.sum(inside * weights, axis=0)
    assert covered.mean() == pytest.approx(0.95, abs=0.005)
    assert covered.min() > 0.915


def test_the_interval_of_a_difference_of_shares_is_newcombes():
    # Table II of Newcombe 1998, method 10: 56/70 - 48/80, 9/10 - 3/10, 10/10 - 0/10.
    for a, m, b, n, expected in (
        (56, 70, 48, 80, (0.0524, 0.3339)),
        (9, 10, 3, 10, (0.1705, 0.8090)),
        (10, 10, 0, 10, (0.6075, 1.0)),
    ):
        given = share_estimate(ones(a, m), ones(b, n))
        assert given[1:3] == pytest.approx(expected, abs=5e-5)
        assert given.value == pytest.approx(a / m - b / n) and given.count == m + n


def test_variance_that_draws_share_is_as_fewer_draws():
    # As much again as 400 independent draws have leaves 200.
    given = share_estimate(ones(80, 400), shared=0.2 * 0.8 / 400)
    fewer = share_estimate(ones(40, 200))
    assert given[:3] == pytest.approx(fewer[:3]) and given.count == 400


def test_what_is_no_number_leaves_a_share_without_interval():
    assert np.isnan(share_estimate(np.array([1.0, np.nan, 0.0]))[:3]).all()


def test_a_share_of_other_values_is_refused():
    with pytest.raises(ValueError, match=r"zeros and ones, and a value is 0\.5"):
        share_estimate(np.array([1.0, 0.5]))
    with pytest.raises(ValueError, match="at least one prompt"):
        share_estimate(ones(1, 2), ones(0, 0))


def test_groups_are_estimated_as_one_asks():
    hits, groups = np.array([1.0, 0.0, 1.0, 1.0]), ["a", "b", "b", "b"]
    assert by_group("hits", hits, groups, estimate=share_estimate) == {
        "hits": share_estimate(hits),
        "hits/a": share_estimate(hits[:1]),
        "hits/b": share_estimate(hits[1:]),
        "hits/gap": share_estimate(hits[:1], hits[1:]),
    }
