"""The Fréchet distance against closed forms, scipy's square root of matrices, torch-fidelity and clean-fid."""

import numpy as np
import pytest
from scipy import linalg
from sets import peer, two_sets

from ldm_jax.metrics.frechet import (
    Moments,
    expand_frechet,
    frechet,
    frechet_distance,
    moments,
)


def random_moments(rng, width=6, count=100):
    factor = rng.normal(size=(width, width))
    return Moments(rng.normal(size=width), factor @ factor.T, count)


def test_of_two_gaussians_along_the_same_axes_it_is_the_closed_form():
    rng = np.random.default_rng(0)
    axes = linalg.qr(rng.normal(size=(5, 5)))[0]
    first, second = rng.uniform(0.5, 3, size=(2, 5))
    a = Moments(rng.normal(size=5), (axes * first**2) @ axes.T, 10)
    b = Moments(rng.normal(size=5), (axes * second**2) @ axes.T, 10)
    expected = np.sum((a.mean - b.mean) ** 2) + np.sum((first - second) ** 2)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-12)


def test_of_any_two_gaussians_it_is_the_formula_with_scipys_square_root():
    rng = np.random.default_rng(1)
    a, b = random_moments(rng), random_moments(rng)
    cross = np.trace(linalg.sqrtm(a.covariance @ b.covariance)).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance) - 2 * cross
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-10)
    np.testing.assert_allclose(frechet_distance(b, a), expected, rtol=1e-10)


def test_covariances_of_less_than_full_rank_have_a_distance():
    a = Moments(np.zeros(3), np.diag([4.0, 1.0, 0.0]), 10)
    b = Moments(np.zeros(3), np.diag([1.0, 0.0, 9.0]), 10)
    np.testing.assert_allclose(frechet_distance(a, b), 1 + 1 + 9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("change", ["translation", "rotation", "order"])
def test_it_does_not_depend_on(change):
    x, y = two_sets()
    rng = np.random.default_rng(2)
    axes = linalg.qr(rng.normal(size=(24, 24)))[0]
    changed = {
        "translation": lambda features: features + 5,
        "rotation": lambda features: features @ axes,
        "order": lambda features: features[rng.permutation(len(features))],
    }[change]
    x_2, y_2 = changed(x), changed(y)
    before, after = (frechet_distance(moments(a), moments(b)) for a, b in ((x, y), (x_2, y_2)))
    np.testing.assert_allclose(after, before, rtol=1e-9)
    before, after = frechet(x, y), frechet(x_2, y_2)
    # Another order gives other halves, which move the value by little.
    atol = 0.1 * (before.high - before.low) if change == "order" else 1e-9
    np.testing.assert_allclose(after, before, atol=atol)


def test_influences_are_the_derivative_of_the_distance_by_the_weights_of_samples():
    # Of 20 copies of a set, one copy of one sample is a small step.
    x, y = (np.tile(each[:100, :4], (20, 1)) for each in two_sets())
    whole = moments(x), moments(y)
    of_x, of_y = expand_frechet(x, y).influences
    for index in range(20):
        less_x, less_y = (moments(np.delete(each, index, axis=0)) for each in (x, y))
        slopes = [
            1999 * (frechet_distance(*whole) - frechet_distance(*pair))
            for pair in ((less_x, whole[1]), (whole[0], less_y))
        ]
        np.testing.assert_allclose(slopes, (of_x[index], of_y[index]), atol=0.02)
    assert min(of_x.std(), of_y.std()) > 0.2


def test_the_bias_is_that_of_the_jackknife():
    x, y = (each[:, :4] for each in two_sets())
    whole = moments(x), moments(y)
    printed = frechet_distance(*whole)
    of_x = [frechet_distance(moments(np.delete(x, i, axis=0)), whole[1]) for i in range(len(x))]
    of_y = [frechet_distance(whole[0], moments(np.delete(y, i, axis=0))) for i in range(len(y))]
    bias = sum((len(each) - 1) * (np.mean(each) - printed) for each in (of_x, of_y))
    # To delete a sample is a step of finite size: the two agree to order 1 / n.
    assert printed - expand_frechet(x, y).value == pytest.approx(bias, rel=0.05)


def test_a_reference_given_as_moments_adds_no_scatter():
    x, y = two_sets()
    known, drawn = frechet(x, moments(y)), frechet(x, y)
    assert len(expand_frechet(x, moments(y)).influences) == 1
    assert known.high - known.low < drawn.high - drawn.low
    assert known.value > drawn.value  # the bias that the reference's scatter adds is left in
    assert known.count == drawn.count == 300


def test_features_that_never_vary_change_nothing():
    x, y = two_sets()
    expected = frechet(x, y)
    x, y = (np.concatenate([each, np.zeros((len(each), 2))], axis=1) for each in (x, y))
    np.testing.assert_allclose(frechet(x, y), expected, rtol=1e-9)


def test_too_few_samples_are_counted_and_kid_is_offered():
    x, _ = two_sets()
    with pytest.raises(ValueError, match=r"24 samples of 24 dimensions; .* needs 25, and KID"):
        moments(x[:24])
    with pytest.raises(ValueError, match=r"49 samples of 24 dimensions; .* needs 50, .* and KID"):
        frechet(x, x[:49])


def test_features_that_are_no_numbers_are_located():
    x, y = two_sets()
    x[[7, 9], 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"2 of 300 samples are NaN or infinite.* at index 7;"):
        frechet(x, y)


def test_features_of_two_networks_have_no_distance():
    x, y = two_sets()
    with pytest.raises(ValueError, match="features of 24 and 23 dimensions"):
        frechet(x, moments(y[:, :23]))


def test_it_is_what_torch_fidelity_prints():
    # metric_fid.fid_statistics_to_metric of torch-fidelity 0.4.0 on `two_sets()`.
    x, y = two_sets()
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(1.0331454062282575, rel=1e-9)


@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated")  # clean-fid's own call
def test_it_is_what_torch_fidelity_and_clean_fid_answer_now():
    theirs = peer("torch_fidelity.metric_fid")
    import torch

    sets = two_sets()
    a, b = (moments(each) for each in sets)
    statistics = [theirs.fid_features_to_statistics(torch.from_numpy(each)) for each in sets]
    answer = theirs.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(answer, rel=1e-9)
    clean = peer("cleanfid.fid").frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert frechet_distance(a, b) == pytest.approx(clean, rel=1e-9)
