"""The inception score against its extremes, simulation, and torch-fidelity."""

import numpy as np
import pytest
from scipy import special, stats
from sets import peer, two_sets

from ldm_jax.metrics.inception_score import inception_score, inception_score_of_splits


def logits():
    return 3 * two_sets()[0]


def test_samples_alike_score_one_and_sure_samples_of_all_classes_score_their_number():
    np.testing.assert_allclose(inception_score(np.ones((50, 10))), (1, 1, 1, 50))
    sure = 1000 * np.tile(np.eye(10), (500, 1))
    assert inception_score_of_splits(sure, splits=1) == (pytest.approx(10), 0)


def test_the_interval_of_sure_samples_is_that_of_their_classes_entropy():
    classes = np.random.default_rng(0).integers(0, 10, 5000)
    estimate = inception_score(1000 * np.eye(10)[classes])
    # 2 n (log 10 - H) is chi squared with 9 degrees of freedom.
    half = 10 * 1.96 * np.sqrt(2 * 9) / (2 * 5000)
    assert estimate.low < 10 < estimate.high
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.2)


def test_of_one_split_it_is_the_formula():
    p = special.softmax(logits(), axis=1)
    marginal_entropy, entropies = stats.entropy(p.mean(axis=0)), stats.entropy(p, axis=1)
    printed, deviation = inception_score_of_splits(logits(), splits=1)
    assert printed == pytest.approx(np.exp(marginal_entropy - entropies.mean()), rel=1e-9)
    assert deviation == 0


def test_the_bias_of_the_printed_score_is_taken_off():
    rng = np.random.default_rng(0)
    # Samples drawn from a list of logits: the score of the population is a sum over the list.
    population = 2 * rng.normal(size=(200, 12))
    truth = inception_score_of_splits(population, splits=1)[0]
    draws = [rng.choice(population, 60) for _ in range(1000)]
    printed = np.mean([inception_score_of_splits(each, splits=1)[0] for each in draws])
    values = [inception_score(each).value for each in draws]
    error = 3 * np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - truth) < max(error, 0.1 * abs(printed - truth))
    assert abs(printed - truth) > 5 * error


def test_it_does_not_depend_on_order_or_on_a_constant_of_the_logits():
    given = logits()
    changed = given[np.random.default_rng(0).permutation(300)] + 100
    np.testing.assert_allclose(inception_score(changed), inception_score(given), rtol=1e-9)


def test_what_cannot_be_scored_is_said():
    with pytest.raises(ValueError, match=r"1 samples; an interval .* needs two"):
        inception_score(logits()[:1])
    with pytest.raises(ValueError, match="9 samples in 10 splits"):
        inception_score_of_splits(logits()[:9])
    with pytest.raises(ValueError, match="1 of 2 samples are NaN or infinite"):
        inception_score(np.array([[0.0, 1.0], [np.nan, 0.0]]))


def test_splits_give_what_torch_fidelity_prints():
    # metric_isc.isc_features_to_metric of torch-fidelity 0.4.0 on `logits()`, 10 splits and 1.
    expected = 4.477790213396846, 0.37224113179020424
    np.testing.assert_allclose(inception_score_of_splits(logits()), expected, rtol=1e-9)
    whole = inception_score_of_splits(logits(), splits=1)
    np.testing.assert_allclose(whole, (5.0078026691651125, 0), rtol=1e-9)


def test_it_is_what_torch_fidelity_answers_now():
    theirs = peer("torch_fidelity.metric_isc")
    import torch

    answer = theirs.isc_features_to_metric(torch.from_numpy(logits()), splits=7, rng_seed=3)
    expected = answer["inception_score_mean"], answer["inception_score_std"]
    given = inception_score_of_splits(logits(), splits=7, seed=3)
    np.testing.assert_allclose(given, expected, rtol=1e-9)
