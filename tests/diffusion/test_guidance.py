import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import (
    DDIM,
    PREDICTIONS,
    SAMPLERS,
    Cosine,
    Even,
    Leading,
    RectifiedFlow,
    ScaledLinear,
    denoiser,
    diffuse,
    evaluations,
    grid,
    join,
    sample,
    target,
    velocity,
)
from ldm_jax.models.flops import traced_flops
from ldm_jax.types import Cond, Point

X = np.random.default_rng(0).normal(size=(8, 4, 4, 2)).astype(np.float32)
COND = np.arange(8, dtype=np.float32)[:, None]
UNCOND = np.full((1, 1), -1, np.float32)
POINT = RectifiedFlow()(np.full((), 0.6))


def apply(params, x, told, context):
    """Some network that is not linear in anything, and in which the context is felt."""
    return jnp.tanh(params * x + (context[:, 0] + told / 1000)[:, None, None, None])


@partial(jax.jit, static_argnames="prediction")
def guided(scale, prediction=velocity):
    context = join(COND, UNCOND)
    return denoiser(apply, 0.7, context, prediction=prediction, guidance=scale)(X, POINT)


@partial(jax.jit, static_argnames="prediction")
def unguided(context, prediction=velocity):
    return denoiser(apply, 0.7, context, prediction=prediction)(X, POINT)


@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
def test_scale_1_is_conditional_and_scale_0_is_not(prediction):
    uncond = np.broadcast_to(UNCOND, COND.shape)
    np.testing.assert_allclose(guided(1.0, prediction), unguided(COND, prediction), atol=1e-5)
    np.testing.assert_allclose(guided(0.0, prediction), unguided(uncond, prediction), atol=1e-5)


def test_guidance_is_linear_in_its_scale():
    zero, one, seven = (guided(scale).x_0 for scale in (0.0, 1.0, 7.0))
    np.testing.assert_allclose(seven, zero + 7 * (one - zero), atol=1e-4)


def test_every_example_may_have_its_own_scale():
    scales = np.arange(8, dtype=np.float32)
    together = guided(scales).x_0
    for b in (0, 3, 7):
        np.testing.assert_allclose(together[b], guided(scales[b]).x_0[b], rtol=1e-6)


def test_the_denoised_pair_makes_up_x_again():
    np.testing.assert_allclose(diffuse(POINT, *guided(5.0)), X, atol=1e-5)


def test_another_scale_compiles_nothing_anew():
    traces = []

    @jax.jit
    def generate(scale):
        traces.append(scale)
        denoise = denoiser(apply, 0.7, join(COND, UNCOND), prediction=velocity, guidance=scale)
        keys = jax.random.split(jax.random.key(1), 8)
        return sample(denoise, X, grid(RectifiedFlow(), Even(), 4), keys, DDIM())

    results = [generate(scale) for scale in (1.0, 4.0, 7.5)]
    assert len(traces) == 1
    assert not np.allclose(results[0], results[2])


def test_a_sharded_batch_is_guided_without_communication():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, jax.P(axis)) for axis in ("data", None))

    def denoise(x, cond, uncond):
        context = join(cond, uncond)
        return denoiser(apply, 0.7, context, prediction=velocity, guidance=5.0)(x, POINT)

    compiled = jax.jit(denoise, in_shardings=(split, split, whole), out_shardings=split)
    text = compiled.lower(X, COND, UNCOND).compile().as_text()
    assert not re.search(r"all-|collective|reduce-scatter", text)


FLOW = grid(RectifiedFlow(), Even(), 10)  # sigma 1.0, 0.9 ... 0.1
KEYS = jax.random.split(jax.random.key(1), 8)


def walk(interval, sampler=DDIM(), network=apply, points=FLOW, **options):
    denoise = denoiser(
        network,
        0.7,
        join(COND, UNCOND),
        prediction=velocity,
        guidance=5.0,
        interval=interval,
        **options,
    )
    return jax.jit(lambda x: sample(denoise, x, points, KEYS, sampler))(X)


@pytest.mark.parametrize(
    ("interval", "guided"),
    [((0.0, 1.0), 10), ((0.3, 1.0), 8), ((0.0, 0.5), 5), ((0.3, 0.7), 5), ((0.31, 0.32), 0)],
)
def test_the_unconditional_branch_is_in_the_program_only_for_levels_of_the_interval(
    interval, guided
):
    """By the products in the traced program: those of a step with 8 rows, and of one with 16."""

    def network(params, x, told, context):
        return x @ jnp.eye(2)

    def flops(interval):
        return traced_flops(lambda: walk(interval, network=network))

    one = 2 * 2 * X.size  # each of a row's numbers takes two multiply-adds
    assert flops(interval) == one * (10 + guided)
    assert evaluations(DDIM(), FLOW, interval) == 10 + guided


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("interval", [(0.3, 0.7), (0.31, 0.32)])
def test_the_network_sees_as_many_latents_as_are_counted(name, interval):
    rows = []

    def network(params, x, told, context):
        jax.debug.callback(lambda: rows.append(len(x)))
        return apply(params, x, told, context)

    sampler = SAMPLERS[name]()
    jax.block_until_ready(walk(interval, sampler, network))
    jax.effects_barrier()
    assert sum(rows) == len(X) * evaluations(sampler, FLOW, interval)


ONE_STAGE = [name for name in SAMPLERS if SAMPLERS[name]().stages == 1]
INTERVALS = [(0.0, 1.0), (0.3, 1.0), (0.0, 0.5), (0.31, 0.32), (1.0, 1.0)]


@pytest.mark.parametrize(
    ("name", "interval", "points"),
    [
        *((name, (0.3, 0.7), FLOW) for name in ONE_STAGE),
        *(("dpmpp", interval, FLOW) for interval in INTERVALS),
        ("dpmpp", (0.5, 0.99), grid(Cosine(), Even(), 7)),
        ("dpmpp", (0.5, 0.99), grid(ScaledLinear(), Leading(), 6)),
    ],
)
def test_a_limited_walk_is_one_whose_scale_is_1_outside_of_the_interval(name, interval, points):
    """Noise, memory and what few steps change go on over the joints of its segments."""
    low, high = interval

    def both(x, point):
        inside = (low - 1e-6 <= point.sigma) & (point.sigma <= high + 1e-6)
        scale = jnp.where(inside, 5.0, 1.0)
        context = join(COND, UNCOND)
        return denoiser(apply, 0.7, context, prediction=velocity, guidance=scale)(x, point)

    sampler = SAMPLERS[name]()
    expected = jax.jit(lambda x: sample(both, x, points, KEYS, sampler))(X)
    np.testing.assert_allclose(walk(interval, sampler, points=points), expected, atol=5e-5)


def test_a_step_of_two_evaluations_is_guided_as_a_whole():
    """Heun's second one serves the step that began inside; what begins outside is not guided."""
    heun = SAMPLERS["heun"]()
    below, above = (walk((level, 1.0), heun) for level in (0.61, 0.69))
    np.testing.assert_array_equal(below, above)  # 0.7 is the last guided one in both
    assert not np.allclose(below, walk((0.71, 1.0), heun), atol=1e-3)


def test_a_limited_scale_may_be_traced_and_compiles_nothing_anew():
    traces = []

    @jax.jit
    def generate(scale):
        traces.append(scale)
        denoise = denoiser(
            apply, 0.7, join(COND, UNCOND), prediction=velocity, guidance=scale, interval=(0.3, 0.7)
        )
        return sample(denoise, X, FLOW, KEYS, DDIM())

    results = [generate(scale) for scale in (1.0, 4.0, 7.5)]
    assert len(traces) == 1
    assert not np.allclose(results[0], results[2])


def test_a_sharded_batch_is_walked_without_communication():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, jax.P(axis)) for axis in ("data", None))

    def run(x, cond, uncond):
        denoise = denoiser(
            apply,
            0.7,
            join(cond, uncond),
            prediction=velocity,
            guidance=5.0,
            interval=(0.3, 0.7),
            rescale=0.7,
        )
        return sample(denoise, x, FLOW, KEYS, DDIM())

    compiled = jax.jit(run, in_shardings=(split, split, whole), out_shardings=split)
    text = compiled.lower(X, COND, UNCOND).compile().as_text()
    assert not re.search(r"all-|collective|reduce-scatter", text)


def output(rescale):
    """What the network is taken to have said: y, which `target` makes of the denoised pair again."""
    denoise = denoiser(
        apply, 0.7, join(COND, UNCOND), prediction=velocity, guidance=7.0, rescale=rescale
    )
    return np.asarray(target(velocity, POINT, *jax.jit(denoise)(X, POINT)), np.float64)


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaled_guidance_is_that_of_the_paper(phi):
    """Lin et al. (2023, eq. 15 and 16), in f64."""
    told = np.full(8, POINT.told)
    y_c, y_u = (np.asarray(apply(0.7, X, told, c), np.float64) for c in (COND, UNCOND))
    guided = y_u + 7 * (y_c - y_u)
    ratio = y_c.std((1, 2, 3), keepdims=True) / guided.std((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(output(phi), phi * guided * ratio + (1 - phi) * guided, atol=2e-5)


def test_fully_rescaled_guidance_has_the_contrast_of_the_condition():
    y_c = apply(0.7, X, np.full(8, POINT.told, np.float32), COND)
    np.testing.assert_allclose(output(1.0).std((1, 2, 3)), y_c.std((1, 2, 3)), rtol=1e-4, atol=1e-6)
    assert (output(0.0).std((1, 2, 3)) > 1.2 * y_c.std((1, 2, 3))).any()


def test_a_network_that_says_nothing_is_rescaled_to_nothing():
    zeros = lambda params, x, told, context: jnp.zeros_like(x)  # noqa: E731
    assert np.isfinite(walk((0.0, 1.0), network=zeros, rescale=1.0)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"interval": (-0.1, 1.0)}, "0 <= low <= high <= 1, got -0.1 to 1.0"),
        ({"interval": (0.0, 1.5)}, "0 <= low <= high <= 1, got 0.0 to 1.5"),
        ({"interval": (0.7, 0.3)}, "0 <= low <= high <= 1, got 0.7 to 0.3"),
        ({"rescale": 1.1}, r"a share in \[0, 1\], got 1.1"),
    ],
)
def test_impossible_guidance_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        denoiser(apply, 0.7, COND, prediction=velocity, guidance=2.0, **options)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5, np.full(8, 7.5, np.float32)], ids=str)
def test_guidance_of_a_context_of_one_branch_is_refused(rows, scale):
    with pytest.raises(ValueError, match=r"a ndarray; guidance needs both: give it join\("):
        denoiser(apply, 0.7, COND[:rows], prediction=velocity, guidance=scale)


def test_a_context_of_both_branches_without_guidance_is_refused():
    with pytest.raises(ValueError, match="made for both branches, and no guidance; give it a"):
        denoiser(apply, 0.7, join(COND, UNCOND), prediction=velocity)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_joined_context_of_another_number_of_examples_is_refused(rows, interval):
    """Which a network whose context is broadcast would take without a word."""
    broadcast = lambda params, x, told, context: x * context.mean()  # noqa: E731
    joined = join(COND[:rows], UNCOND)
    options = {"prediction": velocity, "guidance": 3.0, "interval": interval}
    denoise = denoiser(broadcast, 0.7, joined, **options)
    with pytest.raises(
        ValueError, match=rf"x holds 8 examples, and join\(...\) made .* of {rows};"
    ):
        sample(denoise, X, FLOW, KEYS, DDIM())


def test_an_interval_on_a_traced_grid_is_refused():
    traced = Point(*(row.astype(np.float32) for row in FLOW))
    with pytest.raises(ValueError, match="needs a grid of NumPy arrays, not a traced one"):
        jax.jit(lambda points: walk((0.3, 0.7), points=points))(traced)


def test_negative_prompts_are_unconditional_rows_of_their_own():
    negatives = np.linspace(-2, 2, 8, dtype=np.float32)[:, None]

    @jax.jit
    def away_from(cond, uncond):
        return denoiser(apply, 0.7, join(cond, uncond), prediction=velocity, guidance=5.0)(
            X, POINT
        ).x_0

    together = away_from(COND, negatives)
    for b in (0, 3, 7):
        alone = away_from(COND, negatives[b : b + 1])
        np.testing.assert_allclose(together[b], alone[b], rtol=1e-6)
    away_from_itself = away_from(COND, COND)
    np.testing.assert_allclose(away_from_itself, unguided(COND).x_0, atol=1e-5)


def test_conditions_are_joined_field_by_field():
    tokens = np.ones((3, 5, 2), np.float32)
    cond = Cond(tokens, mask=np.ones((3, 5), bool))
    uncond = Cond(tokens[:1] * 0, mask=np.zeros((1, 5), bool))
    joined = join(cond, uncond).rows
    np.testing.assert_array_equal(joined.tokens[:, 0, 0], [1, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(joined.mask[:, 0], [True, False] * 3)
    assert joined.pooled is None


def test_conditions_of_other_fields_or_rows_are_refused():
    cond = Cond(jnp.ones((3, 5, 2)))
    with pytest.raises(ValueError, match="same fields"):
        join(cond, cond._replace(mask=jnp.ones((3, 5), bool)))
    with pytest.raises(ValueError, match="1 or 3 unconditional rows, got 2"):
        join(cond, Cond(jnp.ones((2, 5, 2))))
