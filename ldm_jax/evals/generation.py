"""From prompts to pixels as one program."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from ldm_jax.diffusion import (
    EVERYWHERE,
    Interval,
    Prediction,
    Progress,
    Sampler,
    denoiser,
    initial_noise,
    join,
    sample,
)
from ldm_jax.metrics.resize import to_pixels
from ldm_jax.types import Apply, Images, Keys, Latent, NegativeTokens, Params, Point, Tokens

Generate = Callable[[Params, Params, Tokens, NegativeTokens, Keys, Float[Array, ""]], Any]


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
    rescale: float = 0.0,
    interval: Interval = EVERYWHERE,
    finish: Callable[[Images], Any] = to_pixels,
    progress: Progress | None = None,
) -> Generate:
    """Makes `generate(params, frozen, tokens [B, L], negative, keys [B], guidance) -> uint8 [B, rows, columns, 3]`.

    Args:
      apply, prepare: the network.
      encode: `encode(frozen, tokens)`, the text encoder; `decode(frozen, latents)`, the autoencoder's decoder.
      prediction, grid, sampler: how the network is walked from noise to data.
      shape: [H, W, C] of the latents.
      rescale, interval: how guidance is tempered and where there is any, as `denoiser` has it.
      finish: what becomes of the images, about [-1, 1]; `metrics.resize.rounded` gives the same 256 values as floats.
      progress: told on the host of every step that begins, as `sample` has it.

    `negative`, [1, L] or [B, L], is what guidance leads away from: the empty prompt, or others.
    It is pure and is to be jitted: another guidance scale, prompt or key compiles nothing anew. An image depends on its
    prompt and key alone, not on what else is in the batch.
    """

    def generate(
        params: Params,
        frozen: Params,
        tokens: Tokens,
        negative: NegativeTokens,
        keys: Keys,
        guidance: Float[Array, ""],
    ) -> Any:
        branches = (prepare(params, encode(frozen, text)) for text in (tokens, negative))
        denoise = denoiser(
            apply,
            params,
            join(*branches),
            prediction=prediction,
            guidance=guidance,
            rescale=rescale,
            interval=interval,
        )
        latents = sample(denoise, initial_noise(keys, shape), grid, keys, sampler, progress)
        return finish(decode(frozen, latents))

    return generate
