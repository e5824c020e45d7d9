import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from ldm_jax.parallel import MeshConfig, make_mesh, put_batch
from ldm_jax.training import abstract_state, init_state, jit_step, make_step
from ldm_jax.training.step import EMA_SHARE, ema_rate

KEY = jax.random.key(1)
MESHES = [MeshConfig(), MeshConfig(data=2, fsdp=4), MeshConfig(data=2, fsdp=2, tensor=2)]


def advanced(step, steps, size=8, mesh=None, start=None):
    """The state after some steps of a toy run, and the scalars of the last."""
    place = toy.place(mesh) if mesh else None
    state = start or init_state(toy.init, toy.optimizer(), jax.random.key(0), place)
    jitted = jax.jit(step)
    for i in range(steps):
        batch = toy.batch(i * size, size)
        state, scalars = jitted(state, toy.frozen(), put_batch(batch, mesh) if mesh else batch)
    return state, scalars


def assert_close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_a_batch_taken_in_parts_gives_the_step_of_the_whole(accumulate):
    tx = optax.sgd(0.1)  # Not Adam, whose first steps are signs and hide the gradient's size.
    start = init_state(toy.init, tx, jax.random.key(0))
    whole = advanced(make_step(toy.loss, tx, KEY, ema=100), 3, start=start)
    step = make_step(toy.loss, tx, KEY, ema=100, accumulate=accumulate)
    parts = advanced(step, 3, start=start)
    assert_close(toy.host(whole), toy.host(parts), rtol=1e-6, atol=1e-6)


def test_parts_that_do_not_divide_the_batch_are_refused():
    step = make_step(toy.loss, toy.optimizer(), KEY, ema=100, accumulate=3)
    with pytest.raises(ValueError, match=r"batch of 8 .* accumulate=3"):
        advanced(step, 1)


@pytest.mark.parametrize(("config", "accumulate"), list(zip(MESHES, (1, 2, 1), strict=True)))
def test_a_step_is_the_same_on_one_device_and_on_eight(config, accumulate):
    step = make_step(toy.loss, toy.optimizer(), KEY, ema=100, accumulate=accumulate)
    one = advanced(step, 4, size=16)
    many = advanced(step, 4, size=16, mesh=make_mesh(config))
    assert_close(toy.host(one), toy.host(many), rtol=2e-5, atol=1e-6)


def draws(accumulate=1, size=8, mesh=None):
    """What each of eight examples draws, read off bit for bit from a gradient that is the draw."""

    def loss(params, ema, frozen, batch, keys):
        drawn = jax.vmap(jax.random.uniform)(keys)
        return params["w"][batch.index] * drawn

    tx = optax.sgd(float(size))  # undoes the mean; a power of two, so exactly
    step = make_step(loss, tx, KEY, ema=0, accumulate=accumulate)
    state = init_state(lambda key: {"w": jnp.zeros(8)}, tx, jax.random.key(0), ema=False)
    for start in range(0, 8, size):
        batch = toy.batch(start, size)
        batch = put_batch(batch, mesh) if mesh else batch
        state, _ = jax.jit(step)(jax.device_get(state), None, batch)
    return -np.asarray(state.params["w"])


def test_an_example_draws_the_same_bits_in_any_batch_in_any_part_and_on_any_mesh():
    expected = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(KEY, i)))(jnp.arange(8))
    np.testing.assert_array_equal(draws(), expected)
    np.testing.assert_array_equal(draws(size=2), expected)
    np.testing.assert_array_equal(draws(accumulate=4), expected)
    for config in MESHES:
        np.testing.assert_array_equal(draws(mesh=make_mesh(config)), expected)


def padded(fill):
    """Six examples and two rows of padding."""
    batch = toy.batch(0, 8)
    weight = np.where(np.arange(8) < 6, 1.0, 0.0).astype(np.float32)
    latents = np.where(weight[:, None, None, None] > 0, batch.latents, np.float32(fill))
    return batch._replace(weight=weight, latents=latents)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_padding_changes_nothing_but_the_count_of_positions(accumulate):
    tx = optax.sgd(0.1)
    state = init_state(toy.init, tx, jax.random.key(0), ema=False)
    step = jax.jit(make_step(toy.loss, tx, KEY, ema=0, accumulate=accumulate))
    six, scalars = step(state, toy.frozen(), toy.batch(0, 6))
    first, padded_scalars = step(state, toy.frozen(), padded(0.0))
    other, _ = step(state, toy.frozen(), padded(1e3))
    jax.tree.map(np.testing.assert_array_equal, first, other)
    assert_close(six.params, first.params, rtol=1e-6)
    assert_close(scalars, padded_scalars, rtol=1e-5)
    assert (int(six.examples), int(first.examples), int(first.step)) == (6, 8, 1)


def test_the_loss_is_the_weighted_mean():
    weight = np.array([2.0, 1.0, 0.0, 0.5], np.float32)
    batch = toy.batch(0, 4)._replace(weight=weight)
    step = make_step(lambda p, e, f, b, k: b.latents[:, 0, 0, 0], optax.sgd(0.0), KEY, ema=0)
    _, scalars = jax.jit(step)(init_state(toy.init, optax.sgd(0.0), KEY, ema=False), None, batch)
    expected = np.average(batch.latents[:, 0, 0, 0], weights=weight)
    np.testing.assert_allclose(scalars["loss"], expected, rtol=1e-6)


def test_scalars_are_the_loss_and_the_norm_of_its_gradient():
    tx = optax.sgd(0.5)
    state = init_state(lambda key: {"w": jnp.array([3.0, 4.0])}, tx, KEY, ema=False)
    loss = lambda p, e, f, b, k: jnp.full(4, p["w"] @ jnp.array([0.0, 2.0]))  # noqa: E731
    _, scalars = jax.jit(make_step(loss, tx, KEY, ema=0))(state, None, toy.batch(0, 4))
    expected = {"loss": 8.0, "grad_norm": 2.0}
    assert {name: float(value) for name, value in scalars.items()} == pytest.approx(expected)


def test_the_loss_is_shown_the_average_and_does_not_train_it():
    def loss(params, ema, frozen, batch, keys):
        return jnp.full(4, params["w"] * ema["w"])

    tx = optax.sgd(1.0)
    start = init_state(lambda key: {"w": jnp.array(2.0)}, tx, KEY)
    start = start._replace(ema={"w": jnp.array(5.0)}, examples=jnp.uint32(10**9))
    state, _ = jax.jit(make_step(loss, tx, KEY, ema=1e12))(start, None, toy.batch(0, 4))
    assert float(state.params["w"]) == 2.0 - 5.0
    np.testing.assert_allclose(state.ema["w"], 5.0, rtol=1e-6)


def resting(ema, examples):
    """A state whose parameters rest at 0 while their average is still at 1."""
    tx = optax.sgd(0.0)
    state = init_state(lambda key: {"w": jnp.zeros(())}, tx, KEY)
    state = state._replace(ema={"w": jnp.ones(())}, examples=jnp.uint32(examples))
    loss = lambda p, e, f, b, k: jnp.zeros(len(b.weight)) * p["w"]  # noqa: E731
    return jax.jit(make_step(loss, tx, KEY, ema=ema)), state


@pytest.mark.parametrize("size", [4, 8, 16])
def test_the_average_goes_half_the_way_in_a_half_life_whatever_the_batch_size(size):
    step, state = resting(ema=64, examples=1_000_000)
    for start in range(0, 128, size):
        state, _ = step(state, None, toy.batch(start, size))
        if start + size == 64:
            np.testing.assert_allclose(state.ema["w"], 0.5, rtol=1e-5)
    np.testing.assert_allclose(state.ema["w"], 0.25, rtol=1e-5)


def test_the_early_average_forgets_the_initial_parameters_as_a_power_of_the_examples():
    """Without a limit the steps n = 1, 2, ... keep 2^(-1 / (share n)): in all 2^(-H_n / share)."""
    kept = [1.0 - float(ema_rate(1e12, jnp.uint32(4 * n), 4)) for n in range(5, 50)]
    harmonic = sum(1.0 / n for n in range(5, 50))
    np.testing.assert_allclose(math.prod(kept), 2.0 ** (-harmonic / EMA_SHARE), rtol=1e-4)
    step, state = resting(ema=1e12, examples=0)
    state, _ = step(state, None, toy.batch(0, 4))
    np.testing.assert_allclose(state.ema["w"], 2.0 ** (-1 / EMA_SHARE), rtol=1e-3)


def test_without_an_average_the_parameters_stand_in_for_it():
    tx = toy.optimizer()
    start = init_state(toy.init, tx, KEY, ema=False)
    assert start.ema is None and not jax.tree.leaves(abstract_state(toy.init, tx, ema=False).ema)
    shown = []

    def loss(params, ema, *rest):
        shown.append(jax.tree.map(jnp.shape, ema) == jax.tree.map(jnp.shape, params))
        return toy.loss(params, ema, *rest)

    state, _ = advanced(make_step(loss, tx, KEY, ema=0), 3, start=start)
    kept, _ = advanced(
        make_step(toy.loss, tx, KEY, ema=100), 3, start=init_state(toy.init, tx, KEY)
    )
    assert shown == [True] and state.ema is None and state.average is state.params
    jax.tree.map(np.testing.assert_array_equal, state.params, kept.params)
    assert kept.average is kept.ema


@pytest.mark.parametrize(("half_life", "kept", "said"), [(0, True, "an"), (9.0, False, "no")])
def test_an_average_is_kept_by_the_step_and_the_state_or_by_neither(half_life, kept, said):
    state = init_state(toy.init, toy.optimizer(), KEY, ema=kept)
    step = make_step(toy.loss, toy.optimizer(), KEY, ema=half_life)
    with pytest.raises(ValueError, match=f"ema is {half_life}, and the state keeps {said} average"):
        jax.eval_shape(step, state, toy.frozen(), toy.batch(0, 8))


def test_frozen_parameters_are_no_constants_of_the_program():
    step = make_step(toy.loss, toy.optimizer(), KEY, ema=100)
    state = init_state(toy.init, toy.optimizer(), KEY)
    jaxpr = jax.make_jaxpr(step)(state, toy.frozen(), toy.batch(0, 8))
    assert all(np.size(const) <= 1 for const in jaxpr.consts)


@pytest.mark.parametrize("config", MESHES)
def test_jit_step_compiles_once_in_a_loop_of_ones_own(config):
    mesh, tx = make_mesh(config), toy.optimizer()
    state = init_state(toy.init, tx, KEY, toy.place(mesh))
    step = jit_step(make_step(toy.loss, tx, KEY, ema=100), state, mesh)
    for i in range(3):
        state, _ = step(state, toy.frozen(), put_batch(toy.batch(8 * i), mesh))
    assert step.__wrapped__._cache_size() == 1
