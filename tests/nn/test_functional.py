import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.nn.functional import Keys, functional


class Net(nnx.Module):
    """Lists, nesting and a second method."""

    def __init__(self, width, depth, rngs):
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(depth)])
        self.scale = nnx.Param(jnp.full((), 2.0))

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x * self.scale[...]

    def halve(self, x, *, by):
        return x / self.scale[...] + by


INIT, APPLY = functional(lambda rngs: Net(8, 11, rngs))
MAKE = jax.jit(INIT)
X = np.ones((2, 8), np.float32)


@pytest.fixture(scope="module")
def params():
    return MAKE(jax.random.key(0))


def test_parameters_are_nested_dicts_of_arrays_with_string_keys(params):
    def check(tree):
        if isinstance(tree, dict):
            assert all(isinstance(key, str) for key in tree)
            for branch in tree.values():
                check(branch)
        else:
            assert isinstance(tree, jax.Array) and tree.dtype == jnp.float32

    check(params)
    assert set(params) == {"layers", "scale"} and len(params["layers"]) == 11


def test_members_of_a_list_keep_their_order(params):
    x = X
    for i in range(11):
        layer = params["layers"][str(i)]
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    np.testing.assert_allclose(APPLY(params, X), 2 * x, rtol=1e-5)


def test_the_same_key_gives_the_same_parameters_and_another_key_others(params):
    same, other = MAKE(jax.random.key(0)), MAKE(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    kernels = [tree["layers"]["3"]["kernel"] for tree in (params, other)]
    assert not np.any(kernels[0] == kernels[1])


def test_keys_are_those_of_flax():
    ours, flaxs = (Net(8, 3, kind(jax.random.key(5))) for kind in (Keys, nnx.Rngs))
    jax.tree.map(
        np.testing.assert_array_equal, *map(nnx.to_pure_dict, map(nnx.state, (ours, flaxs)))
    )


def test_apply_is_the_module_itself(params):
    module = Net(8, 11, nnx.Rngs(1))
    for i, layer in enumerate(module.layers):
        layer.kernel[...] = params["layers"][str(i)]["kernel"]
        layer.bias[...] = params["layers"][str(i)]["bias"]
    np.testing.assert_allclose(APPLY(params, X), module(X), rtol=1e-5)
    np.testing.assert_allclose(APPLY(params, X, method="halve", by=3), module.halve(X, by=3))


def test_apply_differentiates_and_leaves_its_parameters_alone(params):
    before = jax.tree.map(np.array, params)
    gradient = jax.grad(lambda p: jnp.sum(APPLY(p, X)))(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, before, params)


def test_parameters_are_born_sharded():
    init, _ = functional(lambda rngs: Net(8, 1, rngs))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf):
        return NamedSharding(mesh, PartitionSpec("data") if leaf.ndim else PartitionSpec())

    places = jax.tree.map(place, jax.eval_shape(init, jax.random.key(0)))
    born = jax.jit(init, out_shardings=places)(jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.sharding, born) == places
    jax.tree.map(np.testing.assert_array_equal, born, jax.jit(init)(jax.random.key(0)))


def test_nothing_is_materialised_on_the_way():
    init, apply = functional(lambda rngs: Net(2**20, 11, rngs))  # 48 TB, were it made
    params = jax.eval_shape(init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, 2**20), jnp.float32)
    assert jax.eval_shape(apply, params, x).shape == x.shape
