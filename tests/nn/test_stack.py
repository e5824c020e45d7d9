import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.models import computation
from ldm_jax.nn.functional import functional
from ldm_jax.nn.stack import REMAT, Stack

WIDTH, DEPTH = 6, 3


class Block(nnx.Module):
    """A layer with a child, a list of children and a parameter of its own."""

    def __init__(self, rngs):
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.more = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])
        self.gain = nnx.Param(jax.random.normal(rngs.params(), (WIDTH,)))

    def __call__(self, x, shift):
        return x + jnp.tanh(self.more[0](self.first(x))) * self.gain[...][None] + shift

    def keys(self, text):
        return self.more[1](text)


class Net(nnx.Module):
    """A stack between what a network has around it."""

    def __init__(self, rngs, remat="none", depth=DEPTH):
        self.layers = Stack(Block, depth, rngs, remat)

    def __call__(self, x, shift):
        return self.layers(x, shift)

    def prepare(self, text):
        return self.layers.map(lambda block: block.keys(text))

    def with_each(self, x, shift, each):
        def call(block, x, key):
            x = block(x + key, shift)
            return x, {"hidden": x}

        return self.layers.scan(call, x, each)


def layer(params, i):
    """One block's parameters, applied by a network of that block alone."""
    _, apply = functional(Block)
    params = jax.tree.map(lambda leaf: leaf[i], params["layers"]["block"])
    return lambda *args, **kwargs: apply(params, *args, **kwargs)


def unrolled(params, x, shift):
    for i in range(len(params["layers"]["block"]["gain"])):
        x = layer(params, i)(x, shift)
    return x


@pytest.fixture(scope="module")
def params():
    return jax.jit(functional(Net).init)(jax.random.key(0))


X = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32)
SHIFT = np.float32(0.1)


def test_parameters_have_a_leading_layer_axis_and_differ_between_layers(params):
    shapes = jax.tree.map(jnp.shape, params["layers"]["block"])
    assert shapes["first"]["kernel"] == (DEPTH, WIDTH, WIDTH)
    assert shapes["more"]["1"]["bias"] == (DEPTH, WIDTH)
    assert shapes["gain"] == (DEPTH, WIDTH)
    assert len(np.unique(np.asarray(params["layers"]["block"]["gain"]))) == DEPTH * WIDTH


def test_layers_are_those_that_the_blocks_constructor_makes():
    stack = Stack(Block, DEPTH, nnx.Rngs(0))
    alone = Block(nnx.Rngs(jax.random.split(nnx.Rngs(0).params(), DEPTH)[1]))
    one, every = (nnx.to_pure_dict(nnx.split(module)[1]) for module in (alone, stack.block))
    jax.tree.map(lambda one, every: np.testing.assert_array_equal(one, every[1]), one, every)


def test_abstract_and_jitted_parameters_agree(params):
    abstract = jax.eval_shape(functional(Net).init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract)


def test_stacked_parameters_are_born_sharded():
    init, _ = functional(lambda rngs: Stack(lambda rngs: nnx.Linear(8, 8, rngs=rngs), DEPTH, rngs))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec(None, "data"))
    born = jax.jit(init, out_shardings=place)(jax.random.key(0))
    assert all(leaf.sharding == place for leaf in jax.tree.leaves(born))
    jax.tree.map(np.testing.assert_array_equal, born, jax.jit(init)(jax.random.key(0)))


@pytest.mark.parametrize("depth", (1, DEPTH))
@pytest.mark.parametrize("remat", REMAT)
def test_a_stack_is_its_blocks_in_turn_in_values_and_gradients(remat, depth):
    init, apply = functional(lambda rngs: Net(rngs, remat, depth))
    params = jax.jit(init)(jax.random.key(0))

    def loss(run):
        return lambda params, x: jnp.sum(jnp.sin(run(params, x, SHIFT)))

    given = jax.jit(jax.value_and_grad(loss(apply), argnums=(0, 1)))(params, X)
    expected = jax.jit(jax.value_and_grad(loss(unrolled), argnums=(0, 1)))(params, X)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, given, expected)


@pytest.mark.parametrize("depth", (1, DEPTH))
def test_full_remat_keeps_only_what_goes_into_a_block(depth):
    def kept(remat):
        init, apply = functional(lambda rngs: Net(rngs, remat, depth))
        params = jax.eval_shape(init, jax.random.key(0))

        def residuals(params, x):
            return jax.tree.leaves(jax.vjp(lambda p, x: apply(p, x, SHIFT), params, x)[1])

        leaves = jax.eval_shape(residuals, params, jnp.zeros((1000, WIDTH)))
        return sum(leaf.size for leaf in leaves) / (1000 * WIDTH * depth)

    assert kept("full") < 1.1 and kept("dots") > 1.9 and kept("none") > 2.9


def test_map_and_scan_carry_inputs_and_outputs_of_each_layer(params):
    _, apply = functional(Net)
    keys = apply(params, X, method="prepare")
    given, outs = apply(params, X, SHIFT, keys, method="with_each")
    x = X
    for i in range(DEPTH):
        key = layer(params, i)(X, method="keys")
        np.testing.assert_allclose(keys[i], key, rtol=1e-5)
        x = layer(params, i)(x + key, SHIFT)
        np.testing.assert_allclose(outs["hidden"][i], x, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(given, outs["hidden"][-1])


def test_the_program_does_not_grow_with_depth():
    def size(depth):
        init, apply = functional(lambda rngs: Stack(Block, depth, rngs))
        params = jax.eval_shape(init, jax.random.key(0))
        programs = (
            jax.jit(init).lower(jax.random.key(0)),
            jax.jit(jax.grad(lambda p: jnp.sum(apply(p, X, SHIFT)))).lower(params),
        )
        return [program.as_text().count("\n") for program in programs]

    assert size(2) == size(20)


def test_configs_name_the_rows_that_there_are():
    assert tuple(REMAT) == computation.REMAT


def test_bad_arguments_are_refused(params):
    _, apply = functional(lambda rngs: Net(rngs, "some"))
    with pytest.raises(ValueError, match="remat is 'some'; it can be none, full, dots"):
        apply(params, X, SHIFT)
    with pytest.raises(ValueError, match="at least one block, not 0"):
        Stack(Block, 0, nnx.Rngs(0))
