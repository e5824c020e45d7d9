"""Samplers of first order: one evaluation a step, with or without fresh noise.

A sampler knows neither the schedule nor the network. Its coefficients are functions of the whole
grid, computed in the precision in which that is given: f64 on the host, unless the grid is traced.
None divides by alpha of the point it leaves, so a walk may start at pure noise.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ldm_jax.diffusion.walk import Memoryless, Row, Step, at, moved, step_noise
from ldm_jax.types import Denoise, Keys, Latent, Point


@dataclass(frozen=True)
class DDIM(Memoryless):
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12).

    `eta` is the share of the ancestral noise (eq. 16), from 0 (none) to 1 (as DDPM).

    Raises:
      ValueError: `eta` lies outside [0, 1].
    """

    # share of the ancestral noise, 0 to 1
    eta: float = field(default=0.0, metadata={"range": "[0, 1]"})

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"{type(self).__name__} needs eta in [0, 1], got {self.eta}")

    def step(
        self, denoise: Denoise, x: Latent, carry: None, grid: Point, i: Step, keys: Keys
    ) -> tuple[Latent, None]:
        alpha_s, sigma_s = grid.alpha[1:], grid.sigma[1:]
        fresh = self.eta**2 * _posterior(grid)
        x_0, eps = denoise(x, at(grid, i))
        x = at(alpha_s, i) * x_0 + at(sigma_s * (1 - fresh) ** 0.5, i) * eps
        if self.eta:
            x += at(sigma_s * fresh**0.5, i) * step_noise(keys, i, x.shape[1:])
        return x, None


@dataclass(frozen=True)
class DDPM(Memoryless):
    """Ancestral sampling: x_s is drawn from q(x_s | x_t, x_0) with the predicted x_0.

    It is Ho et al. (2020, eq. 6 and 7, the small fixed variance) for any alpha and sigma. From s to
    the noisier t, x_t = r x_s + q n with r = alpha_t / alpha_s and q^2 = sigma_t^2 - r^2 sigma_s^2,
    so by Bayes' rule x_s has the mean (alpha_s q^2 x_0 + r sigma_s^2 x_t) / sigma_t^2 and the
    variance sigma_s^2 q^2 / sigma_t^2.
    """

    def step(
        self, denoise: Denoise, x: Latent, carry: None, grid: Point, i: Step, keys: Keys
    ) -> tuple[Latent, None]:
        alpha_s, sigma_s = grid.alpha[1:], grid.sigma[1:]
        fresh = _posterior(grid)
        kept = _ratio(grid) * sigma_s**2 / grid.sigma[:-1] ** 2
        x_0 = denoise(x, at(grid, i)).x_0
        mean = at(alpha_s * fresh, i) * x_0 + at(kept, i) * x
        return mean + at(sigma_s * fresh**0.5, i) * step_noise(keys, i, x.shape[1:]), None


@dataclass(frozen=True)
class Euler(Memoryless):
    """Euler's method on the probability flow (Karras et al. 2022, algorithm 1 without correction).

    There x / alpha moves by eps for each unit of sigma / alpha; multiplied out, that is DDIM without
    noise and needs no signal where it starts. On rectified flow it is Euler's method along the
    velocity, as Stable Diffusion 3 is sampled.
    """

    def step(
        self, denoise: Denoise, x: Latent, carry: None, grid: Point, i: Step, keys: Keys
    ) -> tuple[Latent, None]:
        return moved(denoise(x, at(grid, i)), grid, i), None


@dataclass(frozen=True)
class EulerAncestral(DDIM):
    """k-diffusion's Euler ancestral: an Euler step to below the next level, then noise up to it.

    For the noise-to-signal ratios u of t and s it goes down to sqrt(u_s^2 - up^2) with
    up = eta u_s sqrt(1 - u_s^2 / u_t^2), which is DDIM with that `eta` (its eq. 16), on any schedule.

    Raises:
      ValueError: `eta` lies outside [0, 1].
    """

    # share of the ancestral noise, 0 to 1
    eta: float = field(default=1.0, metadata={"range": "[0, 1]"})


@dataclass(frozen=True)
class LCM(Memoryless):
    """Multi-step sampling of a consistency model (Song et al. 2023, algorithm 1; Luo et al. 2023).

    Each step goes to the data at once and noises it again: x_s = alpha_s f + sigma_s n, and ends at
    f itself. f = c_skip x + c_out x_0 with c_skip = d^2 / (k^2 + d^2), c_out = k / sqrt(k^2 + d^2),
    d = 0.5 and k = `scaling` times what the network is told of the time (arXiv:2310.04378).
    The network must have been distilled to be such a function: the exact denoiser gives blurred
    samples whatever the number of steps, so `order` is 0.

    Raises:
      ValueError: `scaling` is not positive.
    """

    # of the time in the boundary condition
    scaling: float = field(default=10.0, metadata={"range": "(0, inf)"})
    order: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not 0 < self.scaling < math.inf:
            raise ValueError(f"LCM needs a finite scaling > 0, got {self.scaling}")

    def step(
        self, denoise: Denoise, x: Latent, carry: None, grid: Point, i: Step, keys: Keys
    ) -> tuple[Latent, None]:
        time = self.scaling * grid.told[:-1]
        skip, out = 0.25 / (time**2 + 0.25), time / (time**2 + 0.25) ** 0.5
        f = at(skip, i) * x + at(out, i) * denoise(x, at(grid, i)).x_0
        xp = grid.alpha.__array_namespace__()
        alpha = xp.concat([grid.alpha[1:-1], np.ones(1)])
        sigma = xp.concat([grid.sigma[1:-1], np.zeros(1)])
        return at(alpha, i) * f + at(sigma, i) * step_noise(keys, i, x.shape[1:]), None


def _ratio(grid: Point) -> Row:
    """alpha_t / alpha_s for every step, from point t of the grid to the next one s."""
    return grid.alpha[:-1] / grid.alpha[1:]


def _posterior(grid: Point) -> Row:
    """The variance of q(x_s | x_t, x_0) for every step, as a share of sigma_s^2: q^2 / sigma_t^2."""
    variance_t, variance_s = grid.sigma[:-1] ** 2, grid.sigma[1:] ** 2
    return (variance_t - _ratio(grid) ** 2 * variance_s) / variance_t
