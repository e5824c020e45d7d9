import math

import jax
import numpy as np
import pytest

from ldm_jax.diffusion import (
    SCHEDULES,
    Cosine,
    Discrete,
    RectifiedFlow,
    ScaledLinear,
    Schedule,
    zero_terminal_snr,
)

TIMES = np.linspace(0, 1, 257)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_formula_serves_numpy_in_f64_and_jax_in_f32(name):
    schedule = SCHEDULES[name]()
    host, device = schedule(TIMES), jax.jit(schedule)(TIMES.astype(np.float32))
    assert isinstance(schedule, Schedule)
    for exact, rounded in zip(host, device, strict=True):
        assert isinstance(exact, np.ndarray) and exact.dtype == np.float64
        assert rounded.dtype == np.float32 and rounded.shape == TIMES.shape
        np.testing.assert_allclose(rounded, exact, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    "schedule", [ScaledLinear(), ScaledLinear(zero_terminal_snr=True), Cosine(), Cosine(s=0.1)]
)
def test_variance_is_preserved(schedule):
    point = schedule(TIMES)
    np.testing.assert_allclose(point.alpha**2 + point.sigma**2, 1, rtol=1e-13)


@pytest.mark.parametrize("name", SCHEDULES)
def test_signal_falls_and_noise_rises_with_time(name):
    point = SCHEDULES[name]()(TIMES)
    assert (np.diff(point.alpha) < 0).all() and (np.diff(point.sigma) > 0).all()
    assert (point.alpha[:-1] > 0).all() and (point.sigma[1:] > 0).all()


def test_scaled_linear_is_the_running_product_of_one_minus_beta():
    alpha_bar, expected = 1.0, []
    for i in range(1000):
        root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999
        alpha_bar *= 1 - root**2
        expected.append(alpha_bar)
    point = ScaledLinear()((np.arange(1000) + 0.5) / 1000)
    np.testing.assert_allclose(point.alpha**2, expected, rtol=1e-12)
    np.testing.assert_array_equal(point.told, np.arange(1000))


def test_a_rescaled_schedule_is_affine_in_alpha_and_ends_without_signal():
    """Lin et al. (2023, algorithm 1): alpha is shifted and scaled, its first value kept."""
    t = (np.arange(1000) + 0.5) / 1000
    alpha, rescaled = (ScaledLinear(zero_terminal_snr=zero)(t).alpha for zero in (False, True))
    slopes = np.diff(rescaled) / np.diff(alpha)
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-6)
    np.testing.assert_allclose(rescaled[0], alpha[0], rtol=1e-12)
    last = ScaledLinear(zero_terminal_snr=True)(np.ones(1))
    assert last.alpha == 0 and last.sigma == 1


def test_betas_rescaled_twice_are_rescaled_once():
    once = zero_terminal_snr((0.1, 0.2, 0.3))
    assert once[-1] == 1
    np.testing.assert_allclose(zero_terminal_snr(once), once, rtol=1e-12)


def test_discrete_time_falls_on_the_index_that_the_network_is_told():
    schedule = Discrete((0.1, 0.2, 0.3, 0.4))
    point = jax.jit(schedule)(np.array([0.0, 0.249, 0.25, 0.75, 0.999, 1.0], np.float32))
    np.testing.assert_array_equal(point.told, [0, 0, 1, 3, 3, 3])
    np.testing.assert_allclose(point.alpha[2] ** 2, 0.9 * 0.8, rtol=1e-6)


def test_cosine_is_the_papers_formula():
    t = np.linspace(0, 0.999, 101)
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(Cosine()(t).alpha ** 2, f / f[0], rtol=1e-12)


def test_cosine_keeps_its_precision_in_f32_at_both_ends():
    t = np.array([1e-6, 1e-4, 0.01, 0.99, 0.999, 1.0], np.float32)
    exact, rounded = Cosine()(t.astype(np.float64)), jax.jit(Cosine())(t)
    # The very last time is a rounded constant itself, 6e-8 off in a distance to 1 of 4e-4.
    tolerance = np.array([1e-6] * 5 + [2e-4])
    assert (abs(rounded.alpha / exact.alpha - 1) < tolerance).all()
    np.testing.assert_allclose(rounded.sigma, exact.sigma, rtol=1e-6)


def test_cosine_leaves_a_little_signal_at_the_end():
    last = Cosine()(np.ones(1))
    assert -16 < 2 * np.log(last.alpha / last.sigma)[0] < -14


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_shift_multiplies_the_ratio_of_noise_to_signal(shift):
    t = np.linspace(0.01, 0.99, 99)
    point = RectifiedFlow(shift)(t)
    np.testing.assert_allclose(point.alpha + point.sigma, 1, rtol=1e-13)
    np.testing.assert_allclose(point.sigma / point.alpha, shift * t / (1 - t), rtol=1e-12)
    np.testing.assert_allclose(point.told, 1000 * point.sigma, rtol=1e-13)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RectifiedFlow(shift=0.0), "shift > 0, got 0.0"),
        (lambda: Discrete(()), "got 0 of them"),
        (lambda: Discrete((0.1, 1.5)), r"\(0, 1\]"),
        (lambda: ScaledLinear(beta_start=0.02), "beta_start <= beta_end"),
        (lambda: ScaledLinear(steps=0), "steps >= 1"),
        (lambda: zero_terminal_snr((0.1,)), "2 betas or more, got 1"),
    ],
)
def test_impossible_schedules_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
