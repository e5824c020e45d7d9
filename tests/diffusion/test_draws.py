import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import DRAWS, Independent, Weyl, gaussian
from ldm_jax.diffusion.draws import _open_uniform

STARTS = [0, 1, 12_345, 2**31 - 7, 2**32 - 100]


def keys_of(index):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), index)


def drawn(draw, index):
    return np.asarray(jax.jit(lambda index: draw(keys_of(index), index))(index))


def run_from(start, count):
    """`count` consecutive indices; past 2^32 they begin again."""
    return ((start + np.arange(count, dtype=np.uint64)) % 2**32).astype(np.uint32)


@pytest.mark.parametrize("name", DRAWS)
def test_an_examples_draw_does_not_depend_on_its_batch(name):
    draw, index = DRAWS[name](), run_from(40, 64)
    order = np.random.default_rng(0).permutation(64)[:10]
    np.testing.assert_array_equal(drawn(draw, index[order]), drawn(draw, index)[order])


def test_noise_of_an_example_does_not_depend_on_its_batch():
    keys = keys_of(run_from(0, 16))
    np.testing.assert_array_equal(gaussian(keys, (4, 4, 2))[5:8], gaussian(keys[5:8], (4, 4, 2)))


def test_noise_is_standard_normal():
    noise = np.asarray(gaussian(keys_of(run_from(0, 64)), (16, 16, 4)))
    assert abs(noise.mean()) < 5 / noise.size**0.5
    assert abs(noise.var() - 1) < 5 * (2 / noise.size) ** 0.5


def test_independent_uniforms_are_uniform():
    index = run_from(0, 4096)
    u = np.sort(drawn(Independent(), index))
    assert abs(u - (np.arange(4096) + 0.5) / 4096).max() < 1.95 / 4096**0.5  # Kolmogorov, p = 0.001


def test_weyl_is_exact_where_a_float_would_round():
    """The fractional parts of i / golden ratio to 2^-32, far beyond the integers that f32 can hold."""
    index = np.array([0, 1, 2, 10_000_019, 2**31 + 1, 2**32 - 1], np.uint32)
    u = drawn(Weyl(), index).astype(np.float64)
    exact = [int(i) * 0x9E3779B9 % 2**32 / 2**32 for i in index]
    np.testing.assert_allclose((u - u[0]) % 1, exact, atol=2.0**-22)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("count", [2, 8, 64, 1000])
def test_any_run_of_examples_fills_the_interval_evenly(start, count):
    """No gap is over 2 / n, and no count is off by more than the known bound for this sequence."""
    index = run_from(start, count)
    u = np.sort(drawn(Weyl(seed=1), index).astype(np.float64))
    gaps = np.diff(np.append(u, u[0] + 1))
    rank = np.arange(count)
    discrepancy = max((u - rank / count).max(), ((rank + 1) / count - u).max())
    assert gaps.max() < 2 / count
    assert discrepancy < (1 + np.log(count)) / count


def test_low_discrepancy_steadies_the_mean_over_a_batch():
    def spread(draw):
        losses = np.exp(-3 * drawn(draw, run_from(0, 256 * 64)))  # any smooth function of time
        return losses.reshape(64, 256).mean(axis=1).std()

    assert spread(Weyl()) < spread(Independent()) / 5


def test_seeds_shift_the_sequence():
    index = run_from(0, 8)
    shift = (drawn(Weyl(seed=1), index) - drawn(Weyl(seed=2), index)) % 1
    assert np.ptp(shift) < 1e-6 and shift[0] > 1e-3


def test_uniforms_stop_short_of_both_ends():
    u = np.asarray(_open_uniform(jnp.array([0, 2**32 - 1], jnp.uint32)))
    np.testing.assert_array_equal(u, [2.0**-24, 1 - 2.0**-24])
