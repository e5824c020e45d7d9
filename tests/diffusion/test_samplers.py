"""What is particular to each sampler; `test_sampler_contract.py` holds what all have in common."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import (
    DDIM,
    DDPM,
    LCM,
    SAMPLERS,
    Cosine,
    DPMpp,
    Euler,
    EulerAncestral,
    Even,
    Heun,
    Karras,
    Leading,
    LogSNR,
    RectifiedFlow,
    ScaledLinear,
    Trailing,
    check_walk,
    gaussian,
    grid,
    initial_noise,
    sample,
    walk_on_normal_data,
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


def test_initial_noise_is_none_of_the_noises_of_the_steps():
    start = initial_noise(keys_of(4), SHAPE)
    for i in range(3):
        step = gaussian(jax.vmap(jax.random.fold_in, (0, None))(keys_of(4), i), SHAPE)
        assert abs(np.corrcoef(np.ravel(start), np.ravel(step))[0, 1]) < 0.2


def test_ddim_euler_and_dpm_solver_of_first_order_are_one_rule(normal_data):
    _, expected = run(normal_data, "cosine", 20, DDIM(), 4)
    for sampler in (Euler(), DPMpp(order=1), EulerAncestral(eta=0.0)):
        _, x = run(normal_data, "cosine", 20, sampler, 4)
        np.testing.assert_allclose(x, expected, atol=2e-6)


def test_euler_ancestral_goes_down_below_the_next_level_and_up_by_noise(normal_data):
    """In the ratio of noise to signal, as k-diffusion writes it, in f64."""
    points, i = grid(Cosine(), Even(), 10), 4
    from_, to = (points.sigma / points.alpha)[i : i + 2]
    up = (to**2 * (from_**2 - to**2) / from_**2) ** 0.5
    down = (to**2 - up**2) ** 0.5
    x = np.linspace(-2, 2, 128).reshape(1, 8, 8, 2).astype(np.float32)
    x_0, _ = normal_data.denoise(x, Point(*(row[i] for row in points)))
    scaled = x / points.alpha[i]
    slope = (scaled - np.asarray(x_0)) / from_
    noise = gaussian(jax.vmap(jax.random.fold_in, (0, None))(keys_of(1), i), SHAPE)
    expected = (scaled + slope * (down - from_) + up * noise) * points.alpha[i + 1]
    found, _ = EulerAncestral().step(normal_data.denoise, x, None, points, i, keys_of(1))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_heun_along_rectified_flow_is_heun_along_the_velocity(mixture_data):
    points, i = grid(RectifiedFlow(), Even(), 8), 3
    t, s = points.sigma[i : i + 2]

    def velocity_at(x, j):
        found = mixture_data.denoise(x, Point(*(jnp.float32(row[j]) for row in points)))
        return np.asarray(found.eps - found.x_0, np.float64)

    x = np.linspace(-2, 2, 128).reshape(1, 8, 8, 2).astype(np.float32)
    first = velocity_at(x, i)
    second = velocity_at((x + (s - t) * first).astype(np.float32), i + 1)
    found, _ = Heun().step(mixture_data.denoise, x, None, points, i, keys_of(1))
    np.testing.assert_allclose(found, x + (s - t) * (first + second) / 2, atol=2e-6)


def test_dpm_solver_with_the_heun_rule_is_exact_for_an_x_0_linear_in_the_log_snr():
    """x / sigma grows by the integral of e^l x_0(l), here in closed form."""
    points = grid(Cosine(), LogSNR(), 20)
    log_snr = np.log(points.alpha[:-1] / points.sigma[:-1])

    def denoise(x, point):
        x_0 = 0.3 + 0.2 * jnp.log(point.alpha / point.sigma) * jnp.ones_like(x)
        return Denoised(x_0, (x - point.alpha * x_0) / point.sigma)

    step = jax.jit(
        lambda x, carry, i: DPMpp(solver="heun").step(denoise, x, carry, points, i, keys_of(1))
    )
    x, carry = np.ones((1, 4, 4, 1), np.float32), np.zeros((1, 4, 4, 1), np.float32)
    x, carry = step(x, carry, 0)
    before = np.float64(x[0, 0, 0, 0])
    for i in range(1, 12):
        x, carry = step(x, carry, i)
    area = np.exp(log_snr) * (0.3 + 0.2 * (log_snr - 1))  # antiderivative of e^l x_0(l)
    expected = points.sigma[12] * (before / points.sigma[1] + area[12] - area[1])
    np.testing.assert_allclose(x, expected, rtol=1e-5)


@pytest.mark.parametrize(("steps", "ends"), [(5, True), (14, True), (15, False), (20, False)])
def test_few_steps_of_dpm_solver_end_with_first_order(normal_data, steps, ends):
    points = grid(Cosine(), LogSNR(lowest=0.01), steps)
    noisy_end = Point(*(row[:-1] for row in grid(Cosine(), LogSNR(), steps + 1)))
    for grid_, lower in ((points, True), (noisy_end, ends)):
        slope = DPMpp()._slope(grid_)
        assert (slope[-1] == 0) == lower and slope[0] == 0 and (slope[1:-1] > 0).all()
    assert (DPMpp(lower_order_final=False)._slope(noisy_end)[1:] > 0).all()


def test_a_consistency_walk_ends_at_the_consistency_function(correlated_data):
    """Whatever the last point: no noise comes after the last evaluation."""
    points, x = grid(ScaledLinear(), Leading(offset=900), 1), np.ones((1, 4, 4, 2), np.float32)
    expected = correlated_data.consistency(
        x, Point(*(np.array(row[0], np.float32) for row in points))
    ).x_0
    found = sample(correlated_data.consistency, x, points, keys_of(1), LCM())
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_without_a_consistency_function_lcm_blurs(normal_data):
    """It is why its order is 0: the exact denoiser loses spread however small the steps."""
    _, x = run(normal_data, "cosine", 250, LCM(), COUNT)
    assert LCM().order == 0 and x.std() < 0.8 * normal_data.std


@pytest.mark.parametrize("eta", [-0.1, 1.1])
@pytest.mark.parametrize("sampler", [DDIM, EulerAncestral])
def test_a_share_of_noise_outside_0_to_1_is_refused(sampler, eta):
    with pytest.raises(ValueError, match=r"eta in \[0, 1\], got"):
        sampler(eta=eta)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DPMpp(order=3), "order 1 or 2, got 3"),
        (lambda: DPMpp(solver="euler"), "midpoint or heun, got 'euler'"),
        (lambda: Heun(variable="time"), "path or ratio, got 'time'"),
        (lambda: LCM(scaling=0.0), "scaling > 0, got 0.0"),
    ],
)
def test_impossible_samplers_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_sampler_is_refused_where_it_is_not_defined_before_anything_is_traced():
    points, traces = grid(RectifiedFlow(), Even(), 4), []

    def denoise(x, point):
        traces.append(x)
        return Denoised(x, x)

    with pytest.raises(ValueError, match=r"no signal, .*variable='path'"):
        sample(denoise, np.ones((1, 4, 4, 2)), points, keys_of(1), Heun(variable="ratio"))
    assert not traces
    check_walk(Heun(variable="ratio"), grid(RectifiedFlow(), Karras(), 4))
    check_walk(Heun(variable="path"), points)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_grid_with_a_second_point_without_noise_or_signal_is_refused(name):
    good = grid(Cosine(), Even(), 4)
    for field in ("alpha", "sigma"):
        row = getattr(good, field).copy()
        row[2] = 0
        with pytest.raises(ValueError, match="signal at all of its points but the first"):
            check_walk(SAMPLERS[name](), good._replace(**{field: row}))


@pytest.mark.parametrize("steps", [2, 5])
def test_a_linear_walk_tells_rules_apart_and_knows_those_that_are_one(steps):
    """DDIM is Euler's method, with eta 1 DDPM (Song et al. 2021, 4.1) and Euler ancestral."""
    for schedule, spacing in ((ScaledLinear(), Trailing()), (RectifiedFlow(), Even())):
        points = grid(schedule, spacing, steps)
        ends = {
            name: walk_on_normal_data(sampler, points)
            for name, sampler in {
                "ddim": DDIM(),
                "euler": Euler(),
                "ddpm": DDPM(),
                "ancestral": EulerAncestral(),
                "eta": DDIM(1.0),
                "half": DDIM(0.5),
                "heun": Heun(),
            }.items()
        }
        alike = {
            frozenset(b for b in ends if np.allclose(ends[a], ends[b], rtol=1e-3)) for a in ends
        }
        assert alike == set(
            map(
                frozenset,
                (["ddim", "euler"], ["ddpm", "ancestral", "eta"], ["half"], ["heun"]),
            )
        )
