"""Fits give back what made the points, and their intervals cover it at their rate."""

import numpy as np
import pytest
from scipy import optimize

from ldm_jax.studies.fit import best_size, fit_loss, fit_power_law

SIZES = np.geomspace(1e5, 3e7, 8)
REPEATS = 200
LAW = (3.0, -0.3, 0.7)  # scale, exponent, floor
LOSS = (
    1.8,
    480.0,
    0.35,
    2100.0,
    0.37,
)  # E, A, alpha, B, beta: about those of Besiroglu et al. 2024
PARAMS, EXAMPLES = (grid.ravel() for grid in np.meshgrid(SIZES[::2], np.geomspace(1e6, 1e10, 6)))


def law(x, floor=True):
    scale, exponent, bottom = LAW
    return scale * (x / SIZES[0]) ** exponent + bottom * floor


def loss(params, examples):
    e, a, alpha, b, beta = LOSS
    return e + a / params**alpha + b / examples**beta


@pytest.mark.parametrize("floor", [False, True])
def test_points_on_a_power_law_give_it_back(floor):
    found = fit_power_law(SIZES, law(SIZES, floor), floor=floor, resamples=20)
    assert found.exponent.value == pytest.approx(LAW[1], rel=1e-6)
    assert found.scale.value == pytest.approx(LAW[0] * SIZES[0] ** -LAW[1], rel=1e-5)
    assert (found.floor is not None) == floor
    if floor:
        assert found.floor.value == pytest.approx(LAW[2], rel=1e-6)
    assert found.curve.at(1e6).value == pytest.approx(law(1e6, floor), rel=1e-6)


def test_points_on_a_loss_give_it_back():
    found = fit_loss(PARAMS, EXAMPLES, loss(PARAMS, EXAMPLES), resamples=20)
    given = [each.value for each in found[:5]]
    np.testing.assert_allclose(given, LOSS, rtol=1e-4)
    assert found.curve.at(1e6, 1e8).value == pytest.approx(loss(1e6, 1e8), rel=1e-8)


def test_small_residuals_are_fitted_by_least_squares_of_logarithms():
    y = law(SIZES, False) * np.exp(1e-4 * np.random.default_rng(0).normal(size=len(SIZES)))
    found = fit_power_law(SIZES, y, resamples=20)
    slope, level = np.polyfit(np.log(SIZES), np.log(y), 1)
    assert found.exponent.value == pytest.approx(slope, rel=1e-9)
    assert np.log(found.scale.value) == pytest.approx(level, rel=1e-9)


def test_one_wild_point_moves_a_fit_little():
    y = law(SIZES, False) * np.exp(1e-3 * np.random.default_rng(0).normal(size=len(SIZES)))
    y[2] *= 1.3
    squares = np.polyfit(np.log(SIZES), np.log(y), 1)[0] - LAW[1]
    found = fit_power_law(SIZES, y, resamples=20).exponent.value - LAW[1]
    assert abs(found) < 0.05 * abs(squares)


def test_the_best_split_of_a_budget_is_where_the_loss_is_least():
    found = fit_loss(PARAMS, EXAMPLES, loss(PARAMS, EXAMPLES), resamples=20)
    params, examples = found.best(1e14)
    least = optimize.minimize_scalar(
        lambda log: loss(np.exp(log), 1e14 / np.exp(log)), bounds=(10, 20), options={"xatol": 1e-9}
    )
    assert np.log(params.value) == pytest.approx(least.x, abs=1e-3)
    assert params.value * examples.value == pytest.approx(1e14)
    assert found.exponent.value == pytest.approx(LOSS[4] / (LOSS[2] + LOSS[4]), rel=1e-4)


def test_the_best_of_a_parabola_is_its_vertex():
    sizes = np.geomspace(1e5, 1e7, 5)
    values = 2 + 0.1 * (np.log(sizes) - np.log(2e6)) ** 2
    size, value = best_size(sizes, values)
    assert size == pytest.approx(2e6) and value == pytest.approx(2)
    with pytest.raises(ValueError, match=r"not among those from 100000 to 1e\+06: try smaller"):
        best_size(sizes[:3], -values[:3])
    with pytest.raises(ValueError, match="three sizes or more, and there are 2"):
        best_size(sizes[:2], values[:2])


def test_what_points_share_widens_the_interval():
    rng = np.random.default_rng(0)
    y = law(SIZES, False) * np.exp(1e-3 * rng.normal(size=len(SIZES)))
    tilts = np.exp(np.concatenate([[0], rng.normal(0, 0.02, 200)])[:, None] * np.log(SIZES))
    alone, shared = (fit_power_law(SIZES, given).exponent for given in (y, y * tilts))
    assert shared.value == alone.value
    assert shared.high - shared.low == pytest.approx(4 * 0.02, rel=0.15)
    assert alone.high - alone.low < 0.01


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        (SIZES[:2], SIZES[:2], "a fit of 2 parameters takes 3 points or more, and there are 2"),
        (SIZES, -SIZES, "y must be finite and above zero everywhere"),
        (SIZES, np.full(8, np.nan), "y must be finite and above zero everywhere"),
        (SIZES[:5], SIZES, "are not as many points of each"),
    ],
)
def test_what_cannot_be_fitted_is_said(x, y, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit_power_law(x, y)


def test_nothing_is_extrapolated_without_a_word():
    curve = fit_power_law(SIZES, law(SIZES), floor=True, resamples=20).curve
    with pytest.raises(
        ValueError, match=r"x = 3e\+08 is 10 times beyond .* 100000 to 3e\+07; reach = 10 extra"
    ):
        curve.at(3e8)
    assert curve.at(3e8, reach=10.0).value == pytest.approx(law(3e8), rel=1e-6)
    with pytest.raises(ValueError, match="x = 1000 is 100 times beyond"):
        curve.at(1e3, reach=99.0)


def covered(fits, truth):
    """The share of intervals that hold the truth."""
    return np.mean([low <= truth <= high for _, low, high, _ in fits])


@pytest.mark.slow
@pytest.mark.parametrize("floor", [False, True])
def test_intervals_of_an_exponent_cover_it(floor):
    """With noise as that of a score between training seeds, 2%."""
    rng = np.random.default_rng(0)
    noise = np.exp(0.02 * rng.normal(size=(REPEATS, len(SIZES))))
    found = [
        fit_power_law(SIZES, law(SIZES, floor) * each, floor=floor, resamples=200) for each in noise
    ]
    assert 0.9 <= covered([each.exponent for each in found], LAW[1]) <= 0.99
    assert 0.9 <= covered([each.curve.at(1e6) for each in found], law(1e6, floor)) <= 0.99


@pytest.mark.slow
def test_intervals_of_a_loss_cover_it():
    rng = np.random.default_rng(0)
    noise = np.exp(0.002 * rng.normal(size=(REPEATS, len(PARAMS))))
    found = [
        fit_loss(PARAMS, EXAMPLES, loss(PARAMS, EXAMPLES) * each, resamples=200) for each in noise
    ]
    for name, truth in zip(found[0]._fields, LOSS, strict=False):
        assert 0.9 <= covered([getattr(each, name) for each in found], truth) <= 0.99, name
    exponent = LOSS[4] / (LOSS[2] + LOSS[4])
    assert 0.9 <= covered([each.exponent for each in found], exponent) <= 0.99
