"""The KL autoencoder: 8x down, 4 channels, trained on full scenes for the mean squared error."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from data import HELD_OUT, TRAINING, batches, draw, images
from optimise import optimise

from ldm_jax.models import names, weights
from ldm_jax.models.kl import AutoencoderKL, KLConfig
from ldm_jax.nn.functional import functional
from ldm_jax.types import Params

CONFIG = KLConfig(
    channels=(16, 32, 64, 64), layers_per_block=1, num_groups=8, scaling_factor=1.0, sample_size=64
)
KL_WEIGHT = 1e-4  # of the divergence a latent number, beside the squared error a pixel value
BATCH, LEARNING_RATE = 8, 2e-3


def train(assets: Path, steps: int) -> None:
    """Trains, measures the latents' scale, and writes the autoencoder into `assets`."""
    init, apply = functional(lambda rngs: AutoencoderKL(CONFIG, rngs))

    def loss(params: Params, x: jax.Array, key: jax.Array) -> tuple[jax.Array, dict]:
        mean, logvar = apply(params, x, method="encode")
        z = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
        error = jnp.mean((apply(params, z, method="decode") - x) ** 2)
        divergence = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
        scalars = {"psnr": -10 * jnp.log10(error / 4), "divergence": divergence}
        return error + KL_WEIGHT * divergence, scalars

    @jax.jit
    def latents(params: Params, x: jax.Array) -> jax.Array:
        return apply(params, x, method="encode")[0]

    def save(params: Params) -> None:
        scale = 1 / np.std(latents(params, images(draw(range(512), seed=TRAINING))))
        config = dataclasses.replace(CONFIG, scaling_factor=round(float(scale), 5))
        weights.save(assets / "vae", params, names.KL, config.to_diffusers(), dtype="float16")

    params = jax.jit(init)(jax.random.key(0))
    data = batches(images, BATCH)
    optimise("autoencoder", loss, params, data, save, steps=steps, learning_rate=LEARNING_RATE)


def load(assets: Path) -> tuple[Callable[[Params, jax.Array], jax.Array], Params]:
    """`reconstruct(params, images) -> images` of the autoencoder in `assets`, and its parameters."""
    config = KLConfig.from_diffusers(weights.read_config(directory := assets / "vae"))
    init, apply = functional(lambda rngs: AutoencoderKL(config, rngs))
    params = weights.load(directory, jax.eval_shape(init, jax.random.key(0)), names.KL)

    def reconstruct(params: Params, x: jax.Array) -> jax.Array:
        y = apply(params, apply(params, x, method="encode_mode"), method="decode")
        return jnp.clip(y, -1, 1)

    return reconstruct, params


def measure(assets: Path, count: int = 1000) -> dict[str, float]:
    """PSNR in dB of the mean squared error over held-out scenes, of either preset."""
    reconstruct, params = load(assets)
    reconstruct = jax.jit(reconstruct)

    def psnr(preset: str) -> float:
        errors = []
        for first in range(0, count, 50):
            x = images(draw(range(first, first + 50), seed=HELD_OUT, preset=preset))
            errors.append(np.mean((reconstruct(params, x) - x) ** 2))
        return float(-10 * np.log10(np.mean(errors) / 4))

    return {f"PSNR, {preset} scenes (dB)": psnr(preset) for preset in ("simple", "full")}
