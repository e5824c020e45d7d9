"""The paired test against enumeration, scipy, and scores recomputed after every exchange."""

import functools

import numpy as np
import pytest
from scipy import stats
from sets import two_sets

from ldm_jax.metrics.frechet import expand_frechet, moments
from ldm_jax.metrics.kernel import expand_mmd, kid, polynomial
from ldm_jax.metrics.paired import paired, paired_sets


def two_runs(difference, count=150):
    """Features of two runs that share much by prompt, and those of a reference."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(count, 4))
    a, b = (shared + rng.normal(size=(count, 4)) for _ in range(2))
    return a + difference, b, 1.3 * rng.normal(size=(2 * count, 4))


def exchange(a, b, rows):
    return np.where(rows[:, None], b, a), np.where(rows[:, None], a, b)


def test_p_is_the_share_of_exchanges_that_differ_as_much():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 12)) + np.array([[0.6], [0.0]])
    exact = stats.permutation_test(
        (a - b,), np.mean, vectorized=True, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert 0.01 < exact < 0.5
    # Drawn exchanges scatter about all 4096.
    assert paired(a, b).p == pytest.approx(exact, abs=4 * np.sqrt(exact / 9999))


def test_what_prompts_share_does_not_hide_a_difference():
    rng = np.random.default_rng(1)
    prompts = 100 * rng.normal(size=50)
    a, b = prompts + 0.5 * rng.normal(size=50) + 1, prompts + 0.5 * rng.normal(size=50)
    result = paired(a, b)
    assert result.p < 0.001
    assert result.difference.low < 1 < result.difference.high
    assert result.difference.value == pytest.approx(np.mean(a) - np.mean(b))


def test_equal_scores_do_not_differ():
    scores = np.random.default_rng(2).normal(size=20)
    assert paired(scores, scores) == ((0, 0, 0, 20), 1)


def test_the_order_of_the_runs_is_a_sign():
    a, b = np.random.default_rng(3).normal(size=(2, 30))
    there, back = paired(a, b), paired(b, a)
    assert there.p == back.p
    assert there.difference.value == -back.difference.value


def test_a_score_that_is_no_number_has_no_p():
    result = paired(np.array([1.0, np.nan, 2.0]), np.zeros(3))
    assert np.isnan([result.p, result.difference.value]).all()


def test_unequal_counts_are_refused():
    with pytest.raises(ValueError, match=r"scores of 3 and 2 prompts; .* same prompts"):
        paired(np.zeros(3), np.zeros(2))
    x, y = two_sets()
    with pytest.raises(ValueError, match=r"scores of 300 and 400 prompts"):
        paired_sets(lambda features: expand_mmd(features, x, polynomial), x, y)


@pytest.mark.parametrize("name", ["frechet", "kid"])
def test_the_difference_of_sets_is_that_of_their_scores_after_every_exchange(name):
    a, b, reference = two_runs(difference=0.05, count=600)
    given = moments(reference)
    expand, score = {
        "frechet": (
            lambda features: expand_frechet(features, given),
            lambda features: expand_frechet(features, given).value,
        ),
        "kid": (
            lambda features: expand_mmd(features, reference, polynomial),
            lambda features: kid(features, reference).value,
        ),
    }[name]
    rng = np.random.default_rng(1)
    pairs = [exchange(a, b, rng.integers(0, 2, 600) == 1) for _ in range(8)]
    direct = np.array([score(first) - score(second) for first, second in pairs])
    ours = np.array([paired_sets(expand, *pair).difference.value for pair in pairs])
    # What is left is of third order.
    np.testing.assert_allclose(ours, direct, atol=0.1 * direct.std())


def test_runs_whose_sets_differ_are_told_apart_and_others_not():
    expand = functools.partial(expand_frechet, reference=two_runs(0.0)[2])
    for difference, differs in ((0.0, False), (0.4, True)):
        a, b, _ = two_runs(difference)
        assert (paired_sets(expand, a, b).p < 0.01) == differs
