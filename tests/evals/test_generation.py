"""The program from prompts to images, with a network whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import (
    DDIM,
    Even,
    RectifiedFlow,
    denoiser,
    grid,
    initial_noise,
    join,
    sample,
    velocity,
)
from ldm_jax.evals.generation import make_generate
from ldm_jax.metrics.resize import rounded, to_pixels
from ldm_jax.types import Cond

SHAPE, COUNT = (2, 2, 4), 6
GRID = grid(RectifiedFlow(), Even(), 8)
KEYS = jax.random.split(jax.random.key(0), COUNT)
TOKENS = np.arange(2 * COUNT, dtype=np.int32).reshape(COUNT, 2) % 5


def apply(params, x, told, context):
    """It leans towards its prompt's first token."""
    return jnp.tanh(x - params * context.tokens[:, :1, :1, None] * jnp.ones_like(x))


def encode(frozen, tokens):
    return Cond(tokens[:, :, None] / 10.0)


def drawn(negative, finish=lambda images: images, **options):
    generate = make_generate(
        apply,
        lambda params, cond: cond,
        encode,
        lambda frozen, latents: 0.1 * latents[..., :3],
        prediction=velocity,
        grid=GRID,
        sampler=DDIM(),
        shape=SHAPE,
        finish=finish,
        **options,
    )
    return np.asarray(jax.jit(generate)(0.5, {}, TOKENS, negative, KEYS, jnp.float32(4.0)))


def test_images_are_the_nearest_of_256_values_whoever_asks():
    """The truth of the rounding is NumPy's, of each image as it was decoded."""
    negative = np.zeros((1, 2), np.int32)
    wide = {"finish": lambda images: 9 * images}  # past both ends, too
    images = drawn(negative, **wide)
    expected = np.clip(np.round((images.astype(np.float64) + 1) * 127.5), 0, 255)
    pixels = drawn(negative, lambda images: to_pixels(9 * images))
    assert pixels.dtype == np.uint8 and expected.min() == 0 and expected.max() == 255
    np.testing.assert_array_equal(pixels, expected)
    floats = drawn(negative, lambda images: rounded(9 * images))
    np.testing.assert_array_equal(floats, expected)


def test_every_prompt_may_have_its_own_negative():
    negatives = TOKENS[::-1].copy()
    together = drawn(negatives)
    for b in range(COUNT):
        np.testing.assert_allclose(together[b], drawn(negatives[b : b + 1])[b], atol=1e-6)
    assert np.abs(together - drawn(np.zeros((1, 2), np.int32))).max() > 0.01


def test_guidance_away_from_the_prompt_itself_is_none():
    np.testing.assert_allclose(drawn(TOKENS), drawn(TOKENS, interval=(0.0, 0.0)), atol=1e-6)


@pytest.mark.parametrize("options", [{"rescale": 0.7}, {"interval": (0.3, 0.8)}])
def test_guidance_is_tempered_as_the_denoiser_does(options):
    negative = np.full((1, 2), 3, np.int32)
    pairs = join(encode({}, TOKENS), encode({}, np.repeat(negative, COUNT, axis=0)))
    denoise = denoiser(apply, 0.5, pairs, prediction=velocity, guidance=4.0, **options)
    latents = jax.jit(lambda noise: sample(denoise, noise, GRID, KEYS, DDIM()))(
        initial_noise(KEYS, SHAPE)
    )
    expected = 0.1 * np.asarray(latents)[..., :3]
    np.testing.assert_allclose(drawn(negative, **options), expected, atol=1e-6)
    assert np.abs(drawn(negative) - expected).max() > 1e-3
