"""Every backbone trains alike whatever the mesh: the same losses, and the same parameters at the end."""

import functools

import jax
import numpy as np
import optax
import pytest
from specimens import SMALL, inputs

from ldm_jax.diffusion import ScaledLinear, eps, make_loss
from ldm_jax.models.axes import TABLE
from ldm_jax.models.networks import make_network
from ldm_jax.parallel import (
    MeshConfig,
    device_bytes,
    jit,
    leaf_name,
    make_mesh,
    put_same,
    shardings,
)
from ldm_jax.training import abstract_state, init_state, make_step
from ldm_jax.types import Batch, Cond

MESH = MeshConfig(data=2, fsdp=2, tensor=2)
ROWS, STEPS = 8, 3


def batches(config):
    """Three examples again and again, each time at another position of the data."""
    x, _, cond = inputs(config)
    taken = np.arange(ROWS) % len(x)
    for step in range(STEPS):
        text = Cond(*(None if field is None else np.asarray(field)[taken] for field in cond))
        index = np.arange(ROWS, dtype=np.uint32) + ROWS * step
        latents = x[taken] + 0.01 * index[:, None, None, None].astype("f")
        yield Batch(latents, text, np.ones(ROWS, "f"), index)


def placing(mesh):
    return functools.partial(shardings, table=TABLE, rules=MeshConfig().pairs, mesh=mesh)


def trained(config, mesh):
    """The losses, and the last parameters, on the host."""
    init, apply = make_network(config)
    prepare = functools.partial(apply, method="prepare")
    tx = optax.sgd(0.03, momentum=0.9)  # Adam's first steps are signs, and hide the gradient's size
    loss = make_loss(apply, prepare, schedule=ScaledLinear(), prediction=eps)
    state = init_state(init, tx, jax.random.key(0), placing(mesh))
    step = make_step(loss, tx, jax.random.key(1), ema=100)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jit(step, mesh, donate_argnums=0, out_shardings=(placed, None))
    losses = []
    for batch in batches(config):
        state, scalars = step(state, {}, put_same(batch, mesh))
        losses.append(float(scalars["loss"]))
    return losses, jax.device_get(state.params)


@functools.cache
def alone(name):
    return trained(SMALL[name], make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize("name", ["unet", "pixart", "uvit", "unet of IF's blocks"])
def test_a_mesh_changes_nothing_but_the_rounding(name):
    """Data, noise and dropout are the same bits; sums are taken in another order."""
    losses, params = trained(SMALL[name], make_mesh(MESH))
    expected_losses, expected_params = alone(name)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6)
    jax.tree.map(close, params, expected_params)


@pytest.mark.parametrize("name", SMALL)
def test_fsdp_divides_all_but_small_vectors(name):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    init, tx = make_network(SMALL[name]).init, optax.adamw(1e-3)
    state = abstract_state(init, tx, placing(mesh))
    whole = abstract_state(init, tx)
    assert device_bytes(state) < 0.45 * device_bytes(
        whole
    )  # of tiny networks; full-size ones: 0.26
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        divided = leaf.sharding.shard_shape(leaf.shape) != leaf.shape
        assert divided == leaf_name(path).endswith("kernel"), leaf_name(path)


def test_a_state_is_born_in_parts():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    config = SMALL["unet"]
    state = init_state(
        make_network(config).init, optax.adam(1e-3), jax.random.key(0), placing(mesh)
    )
    alone = jax.jit(make_network(config).init)(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        parts = {shard.data.shape for shard in leaf.addressable_shards}
        assert parts == {leaf.sharding.shard_shape(leaf.shape)}, leaf_name(path)
    jax.tree.map(np.testing.assert_array_equal, state.params, alone)
