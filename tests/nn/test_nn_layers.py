import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from ldm_jax.nn import layers
from ldm_jax.nn.layers import (
    MLP,
    Downsample,
    PixelAttention,
    ResBlock,
    Upsample,
    conv3x3,
    gelu,
    sinusoids,
)

RNG = np.random.default_rng(0)


def drawn(make):
    """The module with every parameter drawn at random, whatever its initialiser."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    return nnx.merge(
        graph, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), "f"), state)
    )


def test_gelu_is_the_input_times_the_normal_distributions_function():
    x = np.linspace(-8, 8, 1001, dtype=np.float32)
    truth = x * scipy.stats.norm.cdf(x.astype(np.float64))
    np.testing.assert_allclose(gelu(jnp.asarray(x)), truth, atol=1e-6)
    half = jnp.asarray(x, jnp.bfloat16)
    truth = np.asarray(half, np.float64) * scipy.stats.norm.cdf(np.asarray(half, np.float64))
    np.testing.assert_allclose(np.asarray(gelu(half), np.float64), truth, rtol=2**-8, atol=5e-4)


def test_layers_of_heads_are_the_layers_on_every_platform(monkeypatch):
    layer = drawn(lambda rngs: layers.linear(6, 6, rngs=rngs))
    x = jnp.asarray(RNG.normal(size=(2, 5, 6)), "f")
    heads = x.reshape(2, 5, 3, 2)
    for name in ("cpu", "tpu"):
        monkeypatch.setattr(layers, "platform", lambda name=name: name)
        np.testing.assert_allclose(layers.from_heads(layer, heads), layer(x), rtol=1e-5, atol=1e-5)
        split = layers.into_heads(layer, x, 3).reshape(2, 5, 6)
        np.testing.assert_allclose(split, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_unfolded_convolution_is_a_convolution_in_value_and_gradient(monkeypatch, dtype):
    module = drawn(lambda rngs: conv3x3(4, 6, dtype=dtype, rngs=rngs))
    graph, state = nnx.split(module)
    x = jnp.asarray(RNG.normal(size=(2, 5, 3, 4)), "f")

    def answer_and_gradient(unfolded):
        monkeypatch.setattr(layers, "UNFOLDED", unfolded)
        call = lambda state, x: nnx.merge(graph, state)(x).astype("f")  # noqa: E731
        loss = lambda state, x: jnp.sum(jnp.sin(call(state, x)))  # noqa: E731
        return call(state, x), jax.grad(loss, argnums=(0, 1))(state, x)

    assert "conv_general_dilated" not in str(jax.make_jaxpr(module)(x))
    tolerance = {"float32": 1e-4, "bfloat16": 0.2}[dtype]
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance)  # noqa: E731
    jax.tree.map(close, answer_and_gradient(30), answer_and_gradient(29))


def test_upsampling_with_the_identity_as_convolution_repeats_pixels():
    layer = drawn(lambda rngs: Upsample(3, dtype="float32", rngs=rngs))
    layer.conv.kernel[...] = jnp.zeros((3, 3, 3, 3)).at[1, 1].set(jnp.eye(3))
    layer.conv.bias[...] = jnp.zeros(3)
    x = RNG.normal(size=(2, 3, 4, 3)).astype("f")
    np.testing.assert_allclose(layer(x), x.repeat(2, 1).repeat(2, 2), atol=1e-6)


@pytest.mark.parametrize(("padding", "first"), [((1, 1), -1), ((0, 1), 0)])
def test_downsampling_sees_the_pixels_that_its_padding_says(padding, first):
    """Sums of 3x3 ones: rows and columns 2i + first ... 2i + first + 2 of the map, where there are such."""
    layer = drawn(lambda rngs: Downsample(1, padding, dtype="float32", rngs=rngs))
    layer.conv.kernel[...] = jnp.ones((3, 3, 1, 1))
    layer.conv.bias[...] = jnp.zeros(1)
    x = RNG.normal(size=(1, 6, 4, 1)).astype("f")
    expected = [
        [
            x[0, max(i + first, 0) : i + first + 3, max(j + first, 0) : j + first + 3].sum()
            for j in (0, 2)
        ]
        for i in (0, 2, 4)
    ]
    np.testing.assert_allclose(layer(x)[0, :, :, 0], expected, atol=1e-5)


def test_a_residual_block_with_a_time_starts_as_its_skip_connection():
    x, time = RNG.normal(size=(2, 4, 4, 4)).astype("f"), RNG.normal(size=(2, 6)).astype("f")
    block = ResBlock(4, 8, 2, 1e-5, time_width=6, dtype="float32", rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(block(x, time), block.conv_shortcut(x))


def test_pixel_attention_knows_no_places():
    layer = drawn(lambda rngs: PixelAttention(4, 2, 1e-6, dtype="float32", rngs=rngs))
    x = RNG.normal(size=(2, 3, 4, 4)).astype("f")
    order = RNG.permutation(12)

    def shuffled(array):
        return np.asarray(array).reshape(2, 12, 4)[:, order]

    moved = layer(jnp.asarray(shuffled(x).reshape(x.shape)))
    np.testing.assert_allclose(np.reshape(moved, (2, 12, 4)), shuffled(layer(x)), atol=1e-4)


def test_sinusoids_are_points_on_circles_that_turn_more_and_more_slowly():
    told = np.array([0.0, 1.0, 999.0], "f")
    cosine, sine = np.split(np.asarray(sinusoids(told, 8), np.float64), 2, axis=-1)
    speeds = 10_000.0 ** (-np.arange(4) / 4)
    expected = np.exp(1j * told[:, None] * speeds[None])
    np.testing.assert_allclose(cosine + 1j * sine, expected, atol=1e-4)


def test_the_time_embedding_tells_neighbouring_steps_apart():
    embed = drawn(lambda rngs: MLP(16, 8, 8, dtype="float32", rngs=rngs))
    vectors = np.asarray(embed(sinusoids(jnp.arange(100.0), 16)))
    assert vectors.shape == (100, 8)
    assert np.min(np.linalg.norm(np.diff(vectors, axis=0), axis=-1)) > 1e-2
