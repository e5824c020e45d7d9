import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import (
    DDIM,
    PREDICTIONS,
    Even,
    RectifiedFlow,
    denoiser,
    diffuse,
    grid,
    join,
    sample,
    velocity,
)
from ldm_jax.types import Cond

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


def test_conditions_are_joined_field_by_field():
    tokens = np.ones((3, 5, 2), np.float32)
    cond = Cond(tokens, mask=np.ones((3, 5), bool))
    uncond = Cond(tokens[:1] * 0, mask=np.zeros((1, 5), bool))
    joined = join(cond, uncond)
    np.testing.assert_array_equal(joined.tokens[:, 0, 0], [1, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(joined.mask[:, 0], [True, False] * 3)
    assert joined.pooled is None


def test_conditions_of_other_fields_or_rows_are_refused():
    cond = Cond(jnp.ones((3, 5, 2)))
    with pytest.raises(ValueError, match="same fields"):
        join(cond, cond._replace(mask=jnp.ones((3, 5), bool)))
    with pytest.raises(ValueError, match="1 or 3 unconditional rows, got 2"):
        join(cond, Cond(jnp.ones((2, 5, 2))))
