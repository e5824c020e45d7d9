"""Norms against the closed form in float64, and against torch, from tame activations to large means and outliers."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ldm_jax
from ldm_jax.nn.norms import PARTS, GroupNorm, LayerNorm, layer_norm, moments

RNG = np.random.default_rng(0)
ULP = 2.0**-24  # the relative rounding error of a float32
RATIOS = (0.0, 1.0, 10.0, 1e2, 1e3, 3e3, 1e4)  # of a mean to its deviation
EPSILON = 1e-6
# Shapes of maps, groups; a layer norm's are of its last dim alone.
GROUPS = {"small": ((2, 2, 2, 8), 4), "odd": ((1, 7, 5, 6), 3), "large": ((2, 64, 64, 16), 4)}
LAYERS = {"small": (2, 3, 5), "large": (2, 9, 1280)}


def drawn(make):
    """The module with every parameter drawn at random, whatever its initialiser."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    return nnx.merge(
        graph, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), "f"), state)
    )


def in_groups(x, num_groups):
    return np.asarray(x, np.float64).reshape(len(x), -1, num_groups, x.shape[-1] // num_groups)


def standardised_f64(x, dims):
    x = np.asarray(x, np.float64)
    mean, variance = x.mean(dims, keepdims=True), x.var(dims, keepdims=True)
    return (x - mean) / np.sqrt(variance + EPSILON), 1 / np.sqrt(variance + EPSILON)


def group_norm_f64(x, num_groups):
    return standardised_f64(in_groups(x, num_groups), (1, 3))[0].reshape(x.shape)


@functools.partial(jax.jit, static_argnums=1)
def group_norm(x, num_groups):
    return GroupNorm(x.shape[-1], num_groups, EPSILON, dtype="float32")(x)


@jax.jit
def plain_layer_norm(x):
    return layer_norm(x, jnp.ones((1,) * x.ndim), jnp.zeros((1,) * x.ndim), EPSILON)


def two_groups(x):
    return group_norm(x, 2)


@functools.partial(jax.jit, static_argnums=0)
def gradient(norm, x, g):
    return jax.vjp(norm, x)[1](g)[0]


def with_mean(shape, ratio, offsets):
    """Numbers of deviation 1 about a mean of `ratio`; `offsets` moves each channel as well."""
    x = ratio + RNG.normal(size=shape) + offsets * RNG.normal(size=shape[-1])
    return x.astype(np.float32)


def assert_close(found, expected, ratio=0.0, ulps=4):
    """A mean of `ratio` deviations, rounded to float32, moves the result by an ULP of it."""
    bound = ulps * ULP * (ratio + 2 * np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("offsets", [0.0, 3.0])
@pytest.mark.parametrize("size", GROUPS)
def test_group_norm_is_its_formula_however_large_the_mean(size, offsets, ratio):
    shape, num_groups = GROUPS[size]
    x = with_mean(shape, ratio, offsets)
    assert_close(group_norm(x, num_groups), group_norm_f64(x, num_groups), ratio)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("size", LAYERS)
def test_layer_norm_is_its_formula_however_large_the_mean(size, ratio):
    x = with_mean(LAYERS[size], ratio, 0.0)
    assert_close(plain_layer_norm(x), standardised_f64(x, -1)[0], ratio)


@pytest.mark.parametrize("ratio", RATIOS)
def test_errors_are_no_larger_than_those_of_torch(ratio):
    """But for a factor of 4, as the largest of some thousand errors is chance; both against float64."""
    torch = pytest.importorskip("torch")
    maps, rows = with_mean((2, 32, 32, 16), ratio, 1.0), with_mean((64, 640), ratio, 0.0)
    channels_first = torch.from_numpy(np.moveaxis(maps, -1, 1).copy())
    theirs = torch.nn.functional.group_norm(channels_first, 4, eps=EPSILON).numpy()
    pairs = (
        (group_norm(maps, 4), np.moveaxis(theirs, 1, -1), group_norm_f64(maps, 4)),
        (
            plain_layer_norm(rows),
            torch.nn.functional.layer_norm(torch.from_numpy(rows), (640,), eps=EPSILON).numpy(),
            standardised_f64(rows, -1)[0],
        ),
    )
    for ours, theirs, truth in pairs:
        assert np.abs(ours - truth).max() <= 4 * np.abs(theirs - truth).max()


@pytest.mark.parametrize("outlier", [10.0, 1e2, 1e4, -1e6])
@pytest.mark.parametrize("part", ["first", "eighth", "last"])
def test_outliers_cost_no_accuracy_wherever_they_are(outlier, part):
    """A shift by the first value alone would be wrong by a tenth of the result where that is the outlier."""
    places = {"first": slice(1), "eighth": slice(5), "last": slice(-1, None)}[part]
    maps, rows = with_mean((1, 40, 40, 4), 0.0, 1.0), with_mean((3, 40), 0.0, 0.0)
    maps[:, places, : 1 if part == "first" else None, 0] = outlier
    rows[:, places] = outlier
    for found, expected in (
        (group_norm(maps, 2), group_norm_f64(maps, 2)),
        (plain_layer_norm(rows), standardised_f64(rows, -1)[0]),
    ):
        assert_close(found, expected, ulps=2 * PARTS)


def test_one_outlying_channel_of_a_layer_leaves_the_others_their_values():
    rows = with_mean((5, 768), 0.0, 0.0)
    rows[:, 0] = 1e4
    expected = standardised_f64(rows, -1)[0]
    np.testing.assert_allclose(plain_layer_norm(rows), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ratio", RATIOS)
def test_gradients_are_those_of_the_formula_however_large_the_mean(ratio):
    """d x = (g - mean g - y mean (g y)) / deviation, in float64."""

    def gradient_f64(x, g, dims):
        y, inverse = standardised_f64(x, dims)
        mean = lambda z: z.mean(dims, keepdims=True)  # noqa: E731
        return inverse * (g - mean(g) - y * mean(g * y))

    x, g = with_mean((2, 16, 16, 8), ratio, 1.0), RNG.normal(size=(2, 16, 16, 8)).astype("f")
    expected = gradient_f64(in_groups(x, 2), in_groups(g, 2), (1, 3)).reshape(x.shape)
    assert_close(gradient(two_groups, x, g), expected, ratio)
    assert_close(gradient(plain_layer_norm, x, g), gradient_f64(x, g, -1), ratio)


def test_bfloat16_that_is_nearly_constant_is_standardised_as_it_is_given():
    """One in a hundred differs by the last bit: the sum of squares in float32 is off by more than the variance."""
    x = np.where(np.arange(6400) % 100, 9984.0, 10048.0).reshape(1, 80, 80, 1)
    given = group_norm(jnp.asarray(x, jnp.bfloat16), 1)
    np.testing.assert_allclose(given, group_norm_f64(x, 1), atol=1e-3)


def test_statistics_are_float32_whatever_the_dtype():
    """1024 numbers near 8: a sum in bfloat16 would stop growing at 2048."""
    x = jnp.asarray(RNG.normal(8.0, 1.0, size=(1, 32, 32, 2)), jnp.bfloat16)
    norm = GroupNorm(2, 1, EPSILON, dtype="bfloat16")
    assert norm(x).dtype == jnp.bfloat16
    expected = group_norm_f64(np.asarray(x, "f"), 1)
    np.testing.assert_allclose(np.asarray(norm(x), "f"), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1e3, 1e6])
def test_a_constant_becomes_the_bias(value):
    maps = drawn(lambda _: GroupNorm(4, 2, EPSILON, dtype="float32"))
    rows = drawn(lambda rngs: LayerNorm(4, epsilon=EPSILON, dtype="float32", rngs=rngs))
    x = np.full((1, 3, 3, 4), value, "f")
    for norm in (maps, rows):
        np.testing.assert_allclose(norm(x), np.broadcast_to(norm.bias, x.shape), atol=1e-6)


def test_scale_and_bias_are_of_each_channel():
    maps = drawn(lambda _: GroupNorm(6, 3, EPSILON, dtype="float32"))
    rows = drawn(lambda rngs: LayerNorm(6, epsilon=EPSILON, dtype="float32", rngs=rngs))
    x = RNG.normal(2.0, 3.0, size=(2, 4, 5, 6)).astype("f")
    for norm, plain in ((maps, group_norm_f64(x, 3)), (rows, standardised_f64(x, -1)[0])):
        expected = plain * np.asarray(norm.scale) + np.asarray(norm.bias)
        np.testing.assert_allclose(norm(x), expected, atol=1e-5)


def test_group_norm_undoes_affine_maps_of_whole_groups():
    norm = drawn(lambda _: GroupNorm(4, 2, 1e-12, dtype="float32"))
    x = RNG.normal(size=(2, 4, 4, 4)).astype("f")
    slope, shift = np.array([3.0, 3.0, 0.5, 0.5], "f"), np.array([1.0, 1.0, -2.0, -2.0], "f")
    moved = x * slope[None, None, None] + shift[None, None, None]
    np.testing.assert_allclose(norm(moved), norm(x), atol=1e-5)


def test_the_gradient_keeps_no_float32_copy_of_half_precision_activations():
    x = jax.ShapeDtypeStruct((2, 8, 8, 16), jnp.bfloat16)
    maps = GroupNorm(16, 4, EPSILON, dtype="bfloat16")
    rows = LayerNorm(16, epsilon=EPSILON, dtype="bfloat16", rngs=nnx.Rngs(0))
    for norm in (maps, rows):
        kept = jax.eval_shape(lambda x, norm=norm: jax.vjp(norm.__call__, x)[1], x)
        large = {leaf.dtype for leaf in jax.tree.leaves(kept) if leaf.size >= x.size}
        assert large == {jnp.dtype("bfloat16")}


def test_moments_are_those_of_the_dims_that_are_named():
    x = RNG.normal(5.0, 2.0, size=(3, 4, 5)).astype("f")
    for dims in ((0,), (1, 2), (0, 1, 2)):
        for found, expected in zip(moments(x, dims), (np.mean, np.var), strict=True):
            np.testing.assert_allclose(found, expected(x, dims, keepdims=True), rtol=1e-5)


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="6 channels do not divide into 4 groups"):
        GroupNorm(6, 4, 1e-5, dtype="float32")


def test_no_other_module_computes_a_norm_by_mean_and_variance():
    other = re.compile(r"nnx\.(Layer|Group|Batch|Instance)Norm|jax\.nn\.standardize|jnp\.var\(")
    root = Path(ldm_jax.__file__).parent
    found = [path for path in root.rglob("*.py") if other.search(path.read_text())]
    assert found == [root / "nn" / "norms.py"]
