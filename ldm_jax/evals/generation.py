"""From prompts to images as one program."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from ldm_jax.diffusion import Prediction, Sampler, denoiser, initial_noise, join, sample
from ldm_jax.types import Apply, Images, Keys, Latent, OneTokens, Params, Point, Tokens

Generate = Callable[[Params, Params, Tokens, OneTokens, Keys, Float[Array, ""]], Images]


def make_generate(
    apply: Apply,
    prepare: Callable[[Params, Any], Any],
    encode: Callable[[Params, Tokens], Any],
    decode: Callable[[Params, Latent], Images],
    *,
    prediction: Prediction,
    grid: Point,
    sampler: Sampler,
    shape: tuple[int, int, int],
) -> Generate:
    """Makes `generate(params, frozen, tokens [B, L], empty [1, L], keys [B], guidance) -> images in [-1, 1]`.

    Args:
      apply, prepare: the network.
      encode: `encode(frozen, tokens)`, the text encoder; `decode(frozen, latents)`, the autoencoder's decoder.
      prediction, grid, sampler: how the network is walked from noise to data.
      shape: [H, W, C] of the latents.

    It is pure and is to be jitted: another guidance scale, prompt or key compiles nothing anew. An image depends on its
    prompt and key alone, not on what else is in the batch.
    """

    def generate(
        params: Params,
        frozen: Params,
        tokens: Tokens,
        empty: OneTokens,
        keys: Keys,
        guidance: Float[Array, ""],
    ) -> Images:
        cond = join(encode(frozen, tokens), encode(frozen, empty))
        denoise = denoiser(
            apply, params, prepare(params, cond), prediction=prediction, guidance=guidance
        )
        latents = sample(denoise, initial_noise(keys, shape), grid, keys, sampler)
        return jax.numpy.clip(decode(frozen, latents), -1, 1)

    return generate
