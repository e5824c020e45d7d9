"""From a network to a denoiser, with or without classifier-free guidance."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float

from ldm_jax.diffusion.predictions import Prediction, per_example, solve
from ldm_jax.types import (
    Apply,
    Arr,
    Context,
    Denoise,
    Denoised,
    Latent,
    Params,
    PerExample,
    Point,
)

Interval = tuple[float, float]
EVERYWHERE = (0.0, 1.0)
Scale = float | Float[Array, ""] | PerExample


@dataclass(frozen=True)
class Limited:
    """A denoiser for the steps that leave a noise level of the interval, and one for the others.

    Raises:
      ValueError: the interval is not one of noise levels.
    """

    inside: Denoise
    outside: Denoise
    interval: Interval  # of sigma, both ends included

    def __post_init__(self) -> None:
        check_interval(self.interval)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Joined:
    """The contexts of both branches of guidance: rows c_1, u_1, c_2, u_2, ... `join` makes it."""

    rows: Context


def denoiser(
    apply: Apply,
    params: Params,
    context: Context | Joined,
    *,
    prediction: Prediction,
    guidance: Scale | None = None,
    rescale: float = 0.0,
    interval: Interval = EVERYWHERE,
) -> Denoise | Limited:
    """Makes `denoise(x, point) -> Denoised`, all that a sampler knows of a network.

    Without guidance `context` is prepared for the B prompts. With a guidance scale (one, or one an
    example) it is `join(context, unconditional context)`; both branches run as one batch
    and y = y_u + scale (y_c - y_u) (Ho & Salimans 2022, eq. 6, where scale is 1 + w). At a fixed x
    that is the same guidance for every prediction. The scale may be traced, so that another one
    compiles nothing anew.

    Args:
      rescale: how much of the standard deviation that guidance adds to y is taken back, from 0
        (none) to 1 (all); phi of Lin et al. (2023, arXiv:2305.08891, eq. 15 and 16).
      interval: the noise levels sigma, from 0 (data) to 1 (noise), at which there is guidance
        (Kynkäänniemi et al. 2024). If it is not all of them, the result is for `sample`, which runs
        the conditional branch alone outside of it.

    Raises:
      ValueError: `rescale` or the interval is not within [0, 1]; there is guidance and the context
        is not joined, or the other way round; a joined context is not of as many examples as `x`.
    """
    check_rescale(rescale)
    check_interval(interval)
    _check_joined(context, guidance)

    def denoise(x: Latent, point: Point) -> Denoised:
        told = jnp.broadcast_to(point.told, x.shape[:1])
        if not isinstance(context, Joined):
            y = apply(params, x, told, context)
        else:
            _check_pairs(context, len(x))
            twice = (repeat(row, "B ... -> (B 2) ...") for row in (x, told))
            y = apply(params, *twice, context.rows)
            y_c, y_u = rearrange(y, "(B two) ... -> two B ...", two=2)
            y = _rescaled(y_u + per_example(guidance) * (y_c - y_u), y_c, rescale)
        return solve(prediction, point, y, x)

    if not isinstance(context, Joined) or interval == EVERYWHERE:
        return denoise
    alone = denoiser(apply, params, jax.tree.map(_conditional, context.rows), prediction=prediction)
    return Limited(denoise, alone, interval)


def _check_joined(context: Context | Joined, guidance: Scale | None) -> None:
    if guidance is not None and not isinstance(context, Joined):
        raise ValueError(
            f"denoiser got guidance and a context of one branch, a {type(context).__name__}; guidance needs both:"
            " give it join(context, unconditional context)"
        )
    if guidance is None and isinstance(context, Joined):
        raise ValueError(
            "denoiser got a context that join(...) made for both branches, and no guidance; give it a guidance scale,"
            " or the conditional context alone"
        )


def _check_pairs(context: Joined, num_examples: int) -> None:
    found = {leaf.shape[0] for leaf in jax.tree.leaves(context.rows)}
    if found - {2 * num_examples}:
        raise ValueError(
            f"x holds {num_examples} examples, and join(...) made contexts of {max(found) / 2:g}; give join one"
            " conditional row for each example"
        )


def check_rescale(rescale: float) -> None:
    """Raises ValueError unless it is a share, from 0 to 1."""
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance is rescaled by a share in [0, 1], got {rescale}")


def check_interval(interval: Interval) -> None:
    """Raises ValueError unless it is an interval of noise levels, 0 <= low <= high <= 1."""
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"guidance is limited to noise levels low to high with 0 <= low <= high <= 1, got {low} to {high}"
        )


def guided_steps(grid: Point, interval: Interval) -> Bool[np.ndarray, " S"]:
    """Which steps of a walk leave a point whose sigma lies in the interval.

    Raises:
      ValueError: the grid is traced.
    """
    if isinstance(grid.sigma, jax.core.Tracer):
        raise ValueError(
            "guidance limited to an interval needs a grid of NumPy arrays, not a traced one: which steps are guided "
            "is part of the program"
        )
    low, high = interval
    sigma = np.round(np.asarray(grid.sigma)[:-1], 9)  # so that a level of 0.3 lies in 0.3 to 1
    return (low <= sigma) & (sigma <= high)


def segments(denoise: Denoise | Limited, grid: Point) -> list[tuple[Denoise, int, int]]:
    """The runs of steps that one denoiser serves: it, the first step, and the one after the last."""
    if not isinstance(denoise, Limited):
        return [(denoise, 0, len(grid.alpha) - 1)]
    runs = groupby(enumerate(guided_steps(grid, denoise.interval)), key=lambda step: bool(step[1]))
    result = []
    for guided, run in runs:
        steps = [i for i, _ in run]
        part = denoise.inside if guided else denoise.outside
        result.append((part, steps[0], steps[-1] + 1))
    return result


def _rescaled(y: Latent, y_c: Latent, share: float) -> Latent:
    """The guided output with a part of its standard deviation replaced by the conditional one's."""
    if not share:
        return y
    rows = (jnp.asarray(row, jnp.float32) for row in (y, y_c))
    spread, spread_c = (jnp.std(row, axis=(1, 2, 3), keepdims=True) for row in rows)
    smallest = jnp.finfo(jnp.float32).tiny  # a network that begins with zeros has no spread
    return (share * spread_c / jnp.maximum(spread, smallest) + 1 - share) * y


def _conditional(rows: Arr) -> Arr:
    """The conditional half of rows that `join` put together."""
    return rearrange(rows, "(B two) ... -> two B ...", two=2)[0]


def join(cond: Context, uncond: Context) -> Joined:
    """Interleaves B conditional rows with B unconditional ones, or with one for all: c_1, u_1, ...

    It takes any pytree of arrays [B, ...] that a network has prepared. Unconditional rows may be of
    the empty prompt, or of negative ones, away from which guidance leads. The two of a pair lie
    side by side, so that a batch sharded over devices is guided without communication.

    Raises:
      ValueError: the two have not the same fields, or `uncond` has neither 1 nor B rows.
    """
    structures = jax.tree.structure(cond), jax.tree.structure(uncond)
    if structures[0] != structures[1]:
        raise ValueError(
            f"join needs conditions of the same fields, got {structures[0]} and {structures[1]}"
        )
    return Joined(jax.tree.map(_interleave, cond, uncond))


def _interleave(cond: Any, uncond: Any) -> Array:
    if uncond.shape[0] not in (1, cond.shape[0]):
        raise ValueError(
            f"join needs 1 or {cond.shape[0]} unconditional rows, got {uncond.shape[0]}"
        )
    rows = jnp.broadcast_to(uncond, (cond.shape[0], *uncond.shape[1:]))
    return rearrange(jnp.stack([cond, rows], axis=1), "B two ... -> (B two) ...")
