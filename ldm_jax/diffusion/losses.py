"""The denoising loss, one number an example, for training and for evaluation."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float

from ldm_jax.diffusion.draws import Draw, Independent, gaussian
from ldm_jax.diffusion.predictions import Prediction, determinant, diffuse, target
from ldm_jax.diffusion.schedules import Schedule
from ldm_jax.diffusion.times import Times, Uniform
from ldm_jax.types import Apply, Batch, Context, Keys, Latent, Params, PerExample, Point

Loss = Callable[[Params, Params, Params, Batch, Keys], Float[Array, " B"]]
ValidationLoss = Callable[[Params, Params, Batch, Keys], Float[Array, "B k"]]
Weighting = Callable[[Prediction, Point], PerExample]
Encode = Callable[[Params, Any], Any]  # (frozen parameters, a batch's text) -> Cond
Prepare = Callable[[Params, Any], Context]


def as_given(params: Params, cond: Any) -> Any:
    """The `encode` of text that is encoded already; the `prepare` of a network that takes it so."""
    return cond


@dataclass(frozen=True)
class Flat:
    """The same weight everywhere: the plain mean squared error of what the network predicts."""

    def __call__(self, prediction: Prediction, point: Point) -> PerExample:
        return jnp.ones_like(point.alpha)


@dataclass(frozen=True)
class MinSNR:
    """The error of x_0 times min(SNR, gamma), whatever the network predicts (Hang et al. 2023).

    At a fixed x an error dy of the output is an error dx_0 = -sigma / determinant dy of the data,
    and SNR = alpha^2 / sigma^2. Where the output does not determine the data the weight is 0.

    Raises:
      ValueError: `gamma` is not positive.
    """

    # signal-to-noise ratio above which the weight stops to grow
    gamma: float = field(default=5.0, metadata={"range": "(0, inf)"})

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"MinSNR needs a finite gamma > 0, got {self.gamma}")

    def __call__(self, prediction: Prediction, point: Point) -> PerExample:
        clipped = jnp.minimum(point.alpha**2, self.gamma * point.sigma**2)
        smallest = jnp.finfo(jnp.float32).tiny
        return clipped / jnp.maximum(determinant(prediction, point) ** 2, smallest)


def make_loss(
    apply: Apply,
    prepare: Prepare = as_given,
    encode: Encode = as_given,
    *,
    schedule: Schedule,
    prediction: Prediction,
    times: Times = Uniform(),
    draw: Draw = Independent(),
    weighting: Weighting = Flat(),
) -> Loss:
    """Makes the pretraining loss `loss(params, ema, frozen, batch, keys) -> [B]`.

    Args:
      apply: the network, `apply(params, x, told, context)`.
      prepare: what the network makes of the encoded text, with its own parameters.
      encode: the text encoder, `encode(frozen, batch.cond)`, whose parameters are not trained.
      times: the distribution of t, a map from uniforms; `draw` says where those come from.
      weighting: a factor for each example, from the prediction and its point.

    `keys` holds one key an example. `batch.weight` is not applied: it is for whoever takes the
    mean. `ema` is not used.
    """

    def loss(
        params: Params, ema: Params, frozen: Params, batch: Batch, keys: Keys
    ) -> Float[Array, " B"]:
        time_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        x_0 = jnp.asarray(batch.latents, jnp.float32)
        noise = gaussian(noise_keys, x_0.shape[1:])
        point = schedule(times(draw(time_keys, batch.index)))
        context = prepare(params, encode(frozen, batch.cond))
        error = _squared_error(apply, params, context, prediction, point, x_0, noise)
        return weighting(prediction, point) * error

    return loss


def make_validation_loss(
    apply: Apply,
    prepare: Prepare = as_given,
    encode: Encode = as_given,
    *,
    schedule: Schedule,
    prediction: Prediction,
    levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9),
) -> ValidationLoss:
    """Makes `loss(params, frozen, batch, keys) -> [B, k]`, the mean squared error at k fixed times.

    The noise of an example comes from its key and is the same at all levels: with the same keys
    every call measures the same thing. The arguments are those of `make_loss`.
    """

    def loss(params: Params, frozen: Params, batch: Batch, keys: Keys) -> Float[Array, "B k"]:
        x_0 = jnp.asarray(batch.latents, jnp.float32)
        noise = gaussian(keys, x_0.shape[1:])
        context = prepare(params, encode(frozen, batch.cond))

        def at(t: Float[Array, ""]) -> Float[Array, " B"]:
            point = schedule(jnp.full(x_0.shape[0], t))
            return _squared_error(apply, params, context, prediction, point, x_0, noise)

        return jax.lax.map(at, jnp.asarray(levels, jnp.float32)).T

    return loss


def _squared_error(
    apply: Apply,
    params: Params,
    context: Context,
    prediction: Prediction,
    point: Point,
    x_0: Latent,
    noise: Latent,
) -> Float[Array, " B"]:
    y = apply(params, diffuse(point, x_0, noise), point.told, context)
    error = y.astype(jnp.float32) - target(prediction, point, x_0, noise)
    return reduce(error**2, "B H W C -> B", "mean")
