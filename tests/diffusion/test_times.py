import jax
import numpy as np
import pytest

from ldm_jax.diffusion import TIMES, LogitNormal, Uniform

U = ((np.arange(2000) + 0.5) / 2000).astype(np.float32)


@pytest.mark.parametrize("name", TIMES)
def test_times_rise_from_0_to_1(name):
    u = np.array([2.0**-24, 0.1, 0.5, 0.9, 1 - 2.0**-24], np.float32)
    t = np.asarray(jax.jit(TIMES[name]())(u))
    assert (np.diff(t) > 0).all() and t[0] > 0 and t[-1] < 1


def test_uniform_leaves_the_numbers_as_they_are():
    np.testing.assert_array_equal(Uniform()(U), U)


def test_the_logit_of_a_logit_normal_time_is_normal():
    t = np.asarray(jax.jit(LogitNormal(mean=-0.5, std=1.2))(U), np.float64)
    logit = np.log(t / (1 - t))
    np.testing.assert_allclose(logit.mean(), -0.5, atol=1e-3)
    np.testing.assert_allclose(logit.std(), 1.2, rtol=2e-3)
    within = (abs(logit + 0.5) < 1.2).mean()
    np.testing.assert_allclose(within, 0.6827, atol=1e-3)


def test_a_spread_of_none_is_refused():
    with pytest.raises(ValueError, match=r"std > 0, got 0.0"):
        LogitNormal(std=0.0)
