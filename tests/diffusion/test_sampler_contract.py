"""What every registered sampler must do, and the variants of those that have them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.diffusion import (
    DDIM,
    EVERYWHERE,
    SAMPLERS,
    Cosine,
    DPMpp,
    Even,
    Heun,
    Karras,
    Leading,
    LogSNR,
    RectifiedFlow,
    Sampler,
    ScaledLinear,
    Trailing,
    denoiser,
    evaluations,
    grid,
    join,
    sample,
    velocity,
)
from ldm_jax.types import Denoised, Point

VARIANTS = [  # of the registry's rows, and of their fields
    *(make() for make in SAMPLERS.values()),
    DDIM(eta=0.5),
    DPMpp(order=1),
    DPMpp(solver="heun"),
    Heun(variable="ratio"),
]
WALKS = {
    "cosine": (Cosine(), Even()),
    "rectified flow": (RectifiedFlow(), Even()),
    "shifted flow": (RectifiedFlow(shift=3.0), Even()),
    "scaled linear": (ScaledLinear(), Trailing()),
}
SMOOTH = [  # in the log-SNR, so that second order shows
    (Cosine(), Karras()),
    (RectifiedFlow(), LogSNR()),
    (RectifiedFlow(shift=3.0), Karras(rho=4.0)),
]
COUNT, SHAPE = 64, (8, 8, 2)
every = pytest.mark.parametrize("sampler", VARIANTS, ids=repr)


def keys_of(count, seed=1):
    rows = np.random.default_rng(seed).integers(2**32, size=(COUNT, 2), dtype=np.uint32)
    return jax.random.wrap_key_data(rows[:count])


def noise_of(count):
    return np.random.default_rng(0).normal(size=(COUNT, *SHAPE)).astype(np.float32)[:count]


@partial(jax.jit, static_argnames=("denoise", "sampler"))
def walk(x_1, points, keys, *, denoise, sampler):
    """The grid is traced, so that one program serves all walks of a length."""
    return sample(denoise, x_1, points, keys, sampler)


def target(data, sampler):
    """The function that the sampler asks for."""
    return data.denoise if sampler.order else data.consistency


def draws(sampler):
    """Whether it adds noise of its own."""
    points, x = grid(Cosine(), Even(), 3), noise_of(1)
    denoise = lambda x, point: Denoised(x, x)  # noqa: E731
    ends = [sampler.step(denoise, x, sampler.init(x), points, 0, keys_of(1, s))[0] for s in (1, 2)]
    return bool((ends[0] != ends[1]).any())


DETERMINISTIC = [sampler for sampler in VARIANTS if not draws(sampler)]
STOCHASTIC = [sampler for sampler in VARIANTS if draws(sampler)]


def test_both_kinds_are_tested():
    assert len(DETERMINISTIC) >= 4 and len(STOCHASTIC) >= 3


@every
def test_it_is_a_sampler(sampler):
    assert isinstance(sampler, Sampler)


@pytest.mark.parametrize("data", ["normal_data", "mixture_data"])
@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=repr)
def test_error_falls_at_the_declared_order(data, sampler, flow_ends, request):
    """Against the exact flow, which keeps quantiles; on grids that are smooth in the log-SNR."""
    data, counts = request.getfixturevalue(data), (64, 128, 256)
    u = (np.arange(128).reshape(1, *SHAPE) + 0.5) / 128
    for schedule, spacing in SMOOTH:
        errors = []
        for steps in counts:
            points = grid(schedule, spacing, steps)
            start, end = flow_ends(data, points, u)
            x = walk(start, points, keys_of(1), denoise=data.denoise, sampler=sampler)
            errors.append(abs(np.asarray(x) - end).max())
        slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
        assert abs(slope - sampler.order) < 0.2, (schedule, spacing, errors)


@pytest.mark.parametrize("path", ["cosine", "rectified flow", "shifted flow"])
@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=repr)
def test_error_falls_at_first_order_at_least_on_even_times(path, sampler, normal_data, flow_ends):
    """Where a walk begins or ends at an infinite log-SNR."""
    if path != "cosine" and sampler == Heun(variable="ratio"):
        pytest.skip("not defined where there is no signal")
    u = (np.arange(128).reshape(1, *SHAPE) + 0.5) / 128
    errors = []
    for steps in (64, 256):
        points = grid(*WALKS[path], steps)
        start, end = flow_ends(normal_data, points, u)
        x = walk(start, points, keys_of(1), denoise=normal_data.denoise, sampler=sampler)
        errors.append(abs(np.asarray(x) - end).max())
    assert errors[1] < errors[0] / 3.5


@pytest.mark.parametrize("path", WALKS)
@pytest.mark.parametrize("sampler", STOCHASTIC, ids=repr)
def test_samples_have_the_mean_and_covariance_of_the_data(path, sampler, correlated_data):
    """Within five standard errors; the truth of the second moments' is Wishart's variance."""
    points = grid(*WALKS[path], 500)
    start = correlated_data.noisiest(noise_of(COUNT), points)
    denoise = target(correlated_data, sampler)
    x = np.asarray(walk(start, points, keys_of(COUNT), denoise=denoise, sampler=sampler))
    rows, covariance = x.reshape(-1, 2).astype(np.float64), np.array(correlated_data.covariance)
    spread = np.diag(covariance)
    error = np.sqrt(spread / len(rows))
    assert (abs(rows.mean(0) - correlated_data.mean) < 5 * error).all()
    error = np.sqrt((np.outer(spread, spread) + covariance**2) / len(rows))
    assert (abs(np.cov(rows.T) - covariance) < 5 * error).all()


@pytest.mark.parametrize("sampler", [s for s in STOCHASTIC if s.order], ids=repr)
def test_samples_of_a_mixture_are_distributed_as_it_is(sampler, mixture_data, flow_ends):
    """The largest gap between distribution functions (Kolmogorov, p = 0.001), with a bias of O(1/S)."""
    points = grid(Cosine(), Karras(), 500)
    start, _ = flow_ends(mixture_data, points, np.random.default_rng(3).random((COUNT, *SHAPE)))
    x = walk(start, points, keys_of(COUNT), denoise=mixture_data.denoise, sampler=sampler)
    x = np.sort(np.ravel(x))
    gap = abs(mixture_data.cdf(x, 1.0, 0.0) - (np.arange(x.size) + 0.5) / x.size).max()
    assert gap < 1.95 / x.size**0.5


@every
def test_a_prompts_sample_does_not_depend_on_its_batch(sampler, normal_data):
    """But for the rounding of another compiled program."""
    points = grid(Cosine(), Even(), 50)
    many, few = (
        walk(noise_of(n), points, keys_of(n), denoise=normal_data.denoise, sampler=sampler)
        for n in (COUNT, 4)
    )
    np.testing.assert_allclose(few, many[:4], atol=2e-5)


@every
def test_a_sample_does_not_depend_on_the_number_of_devices(sampler, normal_data):
    points, found = grid(Cosine(), Even(), 10), []
    for count in (1, 2, 4, 8):
        mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])
        rows = NamedSharding(mesh, PartitionSpec("data"))
        given = jax.device_put((noise_of(8), keys_of(8)), rows)
        x = walk(given[0], points, given[1], denoise=normal_data.denoise, sampler=sampler)
        assert len(x.sharding.device_set) == count
        found.append(np.asarray(x))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)


@every
def test_a_walk_may_start_at_pure_noise(sampler, normal_data):
    points = grid(RectifiedFlow(), Even(), 3)
    network = normal_data.network(RectifiedFlow(), velocity)
    denoise = denoiser(network, None, None, prediction=velocity)
    noise = np.ones((2, 4, 4, 2), np.float32)
    assert points.alpha[0] == 0
    if sampler == Heun(variable="ratio"):
        with pytest.raises(ValueError, match="cannot start where there is no signal"):
            sample(denoise, noise, points, keys_of(2), sampler)
    else:
        assert jnp.isfinite(sample(denoise, noise, points, keys_of(2), sampler)).all()


@every
@pytest.mark.parametrize("steps", [1, 2])
def test_one_step_and_two_are_walks(sampler, steps, normal_data):
    points = grid(ScaledLinear(), Trailing(), steps)
    x = sample(normal_data.denoise, noise_of(2), points, keys_of(2), sampler)
    assert jnp.isfinite(x).all()
    if steps == 1:  # nothing but the data that the first evaluation saw
        np.testing.assert_allclose(
            x, normal_data.denoise(noise_of(2), Point(*(row[0] for row in points))).x_0, atol=1e-5
        )


@every
def test_it_can_be_jitted_mapped_and_differentiated(sampler, normal_data):
    points, keys = grid(ScaledLinear(), Leading(), 5), keys_of(2)

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
    np.testing.assert_allclose(slope, np.sum(mapped[2] - mapped[1]), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("sampler", [s for s in VARIANTS if getattr(s, "eta", 0) < 1], ids=repr)
def test_a_traced_grid_gives_the_same_and_a_finite_gradient(sampler, normal_data):
    points, keys = grid(Cosine(), Even(), 20), keys_of(2)  # all of the noise: no slope at its end

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


@every
def test_another_seed_compiles_nothing_anew(sampler, normal_data):
    points, traces = grid(Cosine(), Even(), 4), []

    @jax.jit
    def generate(x_1, keys):
        traces.append(keys)
        return sample(normal_data.denoise, x_1, points, keys, sampler)

    results = [generate(noise_of(2), keys_of(2, seed)) for seed in (1, 2, 3)]
    assert len(traces) == 1 and generate._cache_size() == 1
    assert (results[0] != results[1]).any() == draws(sampler)


@pytest.mark.parametrize("interval", [EVERYWHERE, (0.3, 0.8)])
@pytest.mark.parametrize("devices", [1, 8])
def test_progress_is_told_once_a_step_whatever_the_devices(devices, interval, normal_data):
    points, told = grid(Cosine(), Even(), 7), []
    network = normal_data.network(Cosine(), velocity)
    denoise = denoiser(
        network,
        None,
        join(*np.zeros((2, 8, 1), np.float32)),
        prediction=velocity,
        guidance=2.0,
        interval=interval,
    )
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x, keys = jax.device_put((noise_of(8), keys_of(8)), rows)
    shown = jax.jit(lambda x, keys: sample(denoise, x, points, keys, DDIM(), told.append))
    alone = jax.jit(lambda x, keys: sample(denoise, x, points, keys, DDIM()))
    np.testing.assert_allclose(shown(x, keys), alone(x, keys), atol=1e-5)
    jax.effects_barrier()
    assert sorted(map(int, told)) == list(range(7))
    assert "callback" in str(shown.trace(x, keys).jaxpr)
    assert "callback" not in str(alone.trace(x, keys).jaxpr)
    assert "callback" not in alone.lower(x, keys).compile().as_text()


@every
@pytest.mark.parametrize("steps", [1, 5])
def test_it_evaluates_as_often_as_it_says(sampler, steps, normal_data):
    calls, points = [], grid(Cosine(), Even(), steps)

    def denoise(x, point):
        jax.debug.callback(lambda: calls.append(1))
        return normal_data.denoise(x, point)

    jax.jit(lambda x: sample(denoise, x, points, keys_of(1), sampler))(noise_of(1))
    jax.effects_barrier()
    assert 2 * len(calls) == evaluations(sampler, points)
