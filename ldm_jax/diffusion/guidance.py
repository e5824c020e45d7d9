"""From a network to a denoiser, with or without classifier-free guidance."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float

from ldm_jax.diffusion.predictions import Prediction, per_example, solve
from ldm_jax.types import Apply, Context, Denoise, Denoised, Latent, Params, PerExample, Point


def denoiser(
    apply: Apply,
    params: Params,
    context: Context,
    *,
    prediction: Prediction,
    guidance: float | Float[Array, ""] | PerExample | None = None,
) -> Denoise:
    """Makes `denoise(x, point) -> Denoised`, all that a sampler knows of a network.

    Without guidance `context` is prepared for the B prompts. With a guidance scale (one, or one an
    example) it is prepared for the 2B rows of `join(cond, uncond)`; both branches run as one batch
    and y = y_u + scale (y_c - y_u) (Ho & Salimans 2022, eq. 6, where scale is 1 + w). At a fixed x
    that is the same guidance for every prediction. The scale may be traced, so that another one
    compiles nothing anew.
    """

    def denoise(x: Latent, point: Point) -> Denoised:
        told = jnp.broadcast_to(point.told, x.shape[:1])
        if guidance is None:
            y = apply(params, x, told, context)
        else:
            twice = (repeat(row, "B ... -> (B 2) ...") for row in (x, told))
            y_c, y_u = rearrange(apply(params, *twice, context), "(B two) ... -> two B ...", two=2)
            y = y_u + per_example(guidance) * (y_c - y_u)
        return solve(prediction, point, y, x)

    return denoise


def join(cond: Any, uncond: Any) -> Any:
    """Interleaves B conditional rows with B unconditional ones, or with one for all: c_1, u_1, ...

    It takes any pytree of arrays [B, ...]: a Cond, or tokens still to be encoded. The two of a pair
    lie side by side, so that a batch sharded over devices is guided without communication.

    Raises:
      ValueError: the two have not the same fields, or `uncond` has neither 1 nor B rows.
    """
    structures = jax.tree.structure(cond), jax.tree.structure(uncond)
    if structures[0] != structures[1]:
        raise ValueError(
            f"join needs conditions of the same fields, got {structures[0]} and {structures[1]}"
        )
    return jax.tree.map(_interleave, cond, uncond)


def _interleave(cond: Any, uncond: Any) -> Array:
    if uncond.shape[0] not in (1, cond.shape[0]):
        raise ValueError(
            f"join needs 1 or {cond.shape[0]} unconditional rows, got {uncond.shape[0]}"
        )
    rows = jnp.broadcast_to(uncond, (cond.shape[0], *uncond.shape[1:]))
    return rearrange(jnp.stack([cond, rows], axis=1), "B two ... -> (B two) ...")
