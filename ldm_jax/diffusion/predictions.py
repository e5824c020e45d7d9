"""What a network may predict, and the way back from it: one 2x2 system for all.

A noisy latent and a network's output are two mixtures of the same two unknowns,

    x = alpha x_0 + sigma eps
    y =     a x_0 +     b eps,

so a prediction is the pair (a, b) at a point and nothing else. Training computes y from x_0 and
eps; sampling solves for them. The determinant alpha b - sigma a says where that cannot be done.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.types import Arr, Denoised, Latent, Point

Coefficient = float | Float[Arr, "*points"]
Prediction = Callable[[Point], tuple[Coefficient, Coefficient]]


def eps(point: Point) -> tuple[Coefficient, Coefficient]:
    """The noise (Ho et al. 2020). Determinant alpha: ill-posed where no signal is left."""
    return 0.0, 1.0


def x_0(point: Point) -> tuple[Coefficient, Coefficient]:
    """The data. Determinant -sigma: ill-posed where no noise is left."""
    return 1.0, 0.0


def v(point: Point) -> tuple[Coefficient, Coefficient]:
    """alpha eps - sigma x_0 (Salimans & Ho 2022). Determinant alpha^2 + sigma^2: well-posed."""
    return -point.sigma, point.alpha


def velocity(point: Point) -> tuple[Coefficient, Coefficient]:
    """eps - x_0 (Liu et al. 2022), dx/dt if alpha = 1 - t. Determinant alpha + sigma: well-posed."""
    return -1.0, 1.0


def determinant(prediction: Prediction, point: Point) -> Coefficient:
    """alpha b - sigma a, of the shape of `point`; x_0 and eps cannot be recovered where it is 0."""
    a, b = prediction(point)
    return point.alpha * b - point.sigma * a


def diffuse(point: Point, x_0: Latent, noise: Latent) -> Latent:
    """alpha x_0 + sigma noise, where `point` holds one place for all examples or one for each."""
    return per_example(point.alpha) * x_0 + per_example(point.sigma) * noise


def target(prediction: Prediction, point: Point, x_0: Latent, noise: Latent) -> Latent:
    """y = a x_0 + b eps, what the network is trained to give."""
    a, b = prediction(point)
    return per_example(a) * x_0 + per_example(b) * noise


def solve(prediction: Prediction, point: Point, y: Latent, x: Latent) -> Denoised:
    """x_0 and eps from the network's output y at x; not finite where the determinant is 0."""
    rows = (*prediction(point), point.alpha, point.sigma, determinant(prediction, point))
    a, b, alpha, sigma, det = map(per_example, rows)
    return Denoised(x_0=(b * x - sigma * y) / det, eps=(alpha * y - a * x) / det)


def per_example(coefficient: Coefficient) -> Float[Array, "_ 1 1 1"]:
    """A coefficient of shape [] or [B], in f32 and ready to multiply latents [B, H, W, C]."""
    return jnp.asarray(coefficient, jnp.float32).reshape(-1, 1, 1, 1)
