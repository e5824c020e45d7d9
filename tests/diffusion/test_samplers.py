from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import (
    DDIM,
    DDPM,
    SAMPLERS,
    Cosine,
    Even,
    Leading,
    RectifiedFlow,
    Sampler,
    ScaledLinear,
    Trailing,
    denoiser,
    gaussian,
    grid,
    initial_noise,
    sample,
    velocity,
)
from ldm_jax.types import Denoised, Point

WALKS = {
    "cosine": (Cosine(), Even()),
    "rectified flow": (RectifiedFlow(), Even()),
    "shifted flow": (RectifiedFlow(shift=3.0), Even()),
    "scaled linear": (ScaledLinear(), Trailing()),
}


COUNT, SHAPE = 64, (8, 8, 2)


def keys_of(count):
    rows = np.random.default_rng(1).integers(2**32, size=(COUNT, 2), dtype=np.uint32)
    return jax.random.wrap_key_data(rows[:count])


@partial(jax.jit, static_argnames=("data", "sampler"))
def walk(noise, points, keys, *, data, sampler):
    """The grid is traced, so that one program serves all walks of a length."""
    return sample(data.denoise, data.noisiest(noise, points), points, keys, sampler)


def run(data, path, steps, sampler, count):
    """A sample, and the noise it began with."""
    noise = np.random.default_rng(0).normal(size=(COUNT, *SHAPE)).astype(np.float32)[:count]
    points = grid(*WALKS[path], steps)
    return noise, np.asarray(walk(noise, points, keys_of(count), data=data, sampler=sampler))


@pytest.mark.parametrize("path", ["cosine", "rectified flow", "shifted flow"])
def test_error_falls_at_the_declared_order(normal_data, path):
    """The exact flow keeps the number of standard deviations from the mean."""
    sampler, counts, errors = DDIM(), (16, 32, 64, 128), []
    for steps in counts:
        noise, x = run(normal_data, path, steps, sampler, count=4)
        exact = normal_data.mean + normal_data.std * noise
        errors.append(abs(x - exact).max())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - sampler.order) < 0.1


@pytest.mark.parametrize("path", WALKS)
@pytest.mark.parametrize("sampler", [DDPM(), DDIM(eta=1.0)], ids=repr)
def test_samples_have_the_mean_and_spread_of_the_data(normal_data, path, sampler):
    _, x = run(normal_data, path, 250, sampler, COUNT)
    assert abs(x.mean() - normal_data.mean) < 5 * normal_data.std / x.size**0.5
    np.testing.assert_allclose(x.std(), normal_data.std, rtol=5 / (2 * x.size) ** 0.5)


@pytest.mark.parametrize("path", WALKS)
def test_ddpm_is_ddim_with_all_of_the_ancestral_noise(normal_data, path):
    _, ancestral = run(normal_data, path, 250, DDPM(), COUNT)
    _, implicit = run(normal_data, path, 250, DDIM(eta=1.0), COUNT)
    np.testing.assert_allclose(ancestral, implicit, atol=1e-4)


def test_ddpm_step_is_the_posterior_of_the_forward_process():
    """By Bayes' rule on the joint normal of (x_s, x_t) given x_0, in f64."""
    points, i, x_0, x_t = grid(RectifiedFlow(), Even(), 10), 4, 0.3, 1.1
    alpha_t, alpha_s = points.alpha[i : i + 2]
    sigma_t, sigma_s = points.sigma[i : i + 2]
    covariance = alpha_t / alpha_s * sigma_s**2
    mean = alpha_s * x_0 + covariance / sigma_t**2 * (x_t - alpha_t * x_0)
    variance = sigma_s**2 - covariance**2 / sigma_t**2

    def denoise(x, point):
        return Denoised(jnp.full_like(x, x_0), (x - point.alpha * x_0) / point.sigma)

    @jax.jit
    def step(x):
        return DDPM().step(denoise, x, None, points, i, keys_of(64))[0]

    x = np.asarray(step(np.full((64, 16, 16, 1), x_t, np.float32)))
    np.testing.assert_allclose(x.mean(), mean, atol=5 * (variance / x.size) ** 0.5)
    np.testing.assert_allclose(x.var(), variance, rtol=5 * (2 / x.size) ** 0.5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_prompts_sample_does_not_depend_on_its_batch(normal_data, name):
    """But for the rounding of another compiled program."""
    _, many = run(normal_data, "cosine", 250, SAMPLERS[name](), COUNT)
    _, few = run(normal_data, "cosine", 250, SAMPLERS[name](), 4)
    np.testing.assert_allclose(few, many[:4], atol=2e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_walk_may_start_at_pure_noise(name, normal_data):
    points = grid(RectifiedFlow(), Even(), 3)
    network = normal_data.network(RectifiedFlow(), velocity)
    denoise = denoiser(network, None, None, prediction=velocity)
    noise = np.ones((2, 4, 4, 2), np.float32)
    assert points.alpha[0] == 0
    assert jnp.isfinite(sample(denoise, noise, points, keys_of(2), SAMPLERS[name]())).all()


def test_initial_noise_is_none_of_the_noises_of_the_steps():
    start = initial_noise(keys_of(4), SHAPE)
    for i in range(3):
        step = gaussian(jax.vmap(jax.random.fold_in, (0, None))(keys_of(4), i), SHAPE)
        assert abs(np.corrcoef(np.ravel(start), np.ravel(step))[0, 1]) < 0.2


@pytest.mark.parametrize("name", SAMPLERS)
def test_sample_can_be_jitted_mapped_and_differentiated(normal_data, name):
    sampler, points, keys = SAMPLERS[name](), grid(ScaledLinear(), Leading(), 5), keys_of(2)
    assert isinstance(sampler, Sampler)

    def run(x_1):
        return sample(normal_data.denoise, x_1, points, keys, sampler)

    @jax.jit
    def all_ways(x_1):
        slope = jax.grad(lambda shift: run(x_1[1] + shift).sum())(0.0)
        return run(x_1[1]), jax.vmap(run)(x_1), slope

    x_1 = np.random.default_rng(0).normal(size=(3, 2, 4, 4, 2)).astype(np.float32)
    x_1[2] = x_1[1] + 1
    alone, mapped, slope = all_ways(x_1)
    np.testing.assert_allclose(mapped[1], alone, atol=1e-5)
    # For normal data the walk is linear in where it begins.
    np.testing.assert_allclose(slope, np.sum(mapped[2] - mapped[1]), rtol=1e-3)


@pytest.mark.parametrize("sampler", [DDIM(), DDIM(eta=0.5)], ids=repr)
def test_a_traced_grid_gives_the_same_and_a_finite_gradient(normal_data, sampler):
    points, keys = grid(Cosine(), Even(), 8), keys_of(2)

    def run(points):
        noise = jnp.ones((2, 4, 4, 2))
        return sample(normal_data.denoise, noise, points, keys, sampler)

    def total(points):
        x = run(points)
        return x.sum(), x

    slopes, traced = jax.jit(jax.grad(total, has_aux=True))(
        Point(*(row.astype(np.float32) for row in points))
    )
    np.testing.assert_allclose(traced, jax.jit(lambda: run(points))(), atol=1e-4)
    assert all(np.isfinite(slope).all() for slope in slopes)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_a_share_of_noise_outside_0_to_1_is_refused(eta):
    with pytest.raises(ValueError, match=r"eta in \[0, 1\], got"):
        DDIM(eta=eta)
