"""Noise schedules: where on the noise path x = alpha x_0 + sigma eps a time stands.

Every schedule is called as `schedule(t) -> Point` with times t from 0 (data) to 1 (noise), of any
shape. One formula serves both JAX arrays (f32, inside jit) and NumPy arrays (f64, on the host,
where grids are made).
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from ldm_jax.types import Arr, Point

# At t = 1 a cosine would leave no signal at all (alpha = 0), and eps could not be turned into x_0.
# The paper clips its discrete betas for that; here time stops at an alpha of 6e-4 (log-SNR -15).
_LAST_COSINE_TIME = 0.9996


@runtime_checkable
class Schedule(Protocol):
    """A map from time to a point on the noise path; `steps` is None if time is continuous."""

    steps: int | None

    def __call__(self, t: Float[Arr, "*points"]) -> Point: ...


@dataclass(frozen=True)
class Discrete:
    """The schedule of given betas: alpha_i^2 is the product of 1 - beta_j, j <= i (Ho et al. 2020).

    Time t falls on index i = min(floor(t steps), steps - 1), which is what the network is told.

    Raises:
      ValueError: a beta lies outside (0, 1], or there is none.
    """

    betas: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.betas or not all(0 < beta <= 1 for beta in self.betas):
            raise ValueError(
                f"Discrete needs betas in (0, 1], got {len(self.betas)} of them: {self.betas[:4]}"
            )

    @property
    def steps(self) -> int:
        return len(self.betas)

    def __call__(self, t: Float[Arr, "*points"]) -> Point:
        xp = t.__array_namespace__()
        alpha_bar = np.cumprod(1 - np.asarray(self.betas, np.float64))
        index = xp.clip(xp.floor(t * self.steps), 0, self.steps - 1).astype(int)
        alpha, sigma = (xp.asarray(np.sqrt(row), t.dtype) for row in (alpha_bar, 1 - alpha_bar))
        return Point(alpha[index], sigma[index], index.astype(t.dtype))


def zero_terminal_snr(betas: tuple[float, ...]) -> tuple[float, ...]:
    """The betas of a schedule stretched until its last level holds no signal.

    alpha is shifted to end at 0 and scaled to begin where it did (Lin et al. 2023, arXiv:2305.08891,
    algorithm 1), in float64; the last beta becomes 1.

    Raises:
      ValueError: there are fewer than 2 betas.
    """
    if len(betas) < 2:
        raise ValueError(f"a schedule is stretched between 2 betas or more, got {len(betas)}")
    alpha = np.sqrt(np.cumprod(1 - np.asarray(betas, np.float64)))
    alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    return tuple((1 - alpha_bar / np.append(1.0, alpha_bar[:-1])).tolist())


@dataclass(frozen=True)
class ScaledLinear:
    """Stable Diffusion's discrete schedule, with evenly spaced square roots of the betas.

    It is that of Rombach et al. (2022), or with `zero_terminal_snr` what that function makes of it,
    which is for networks that predict v or x_0. For close parity with a program that keeps its betas in
    f32, give those to `Discrete`.

    Raises:
      ValueError: not 0 < beta_start <= beta_end <= 1, or no steps.
    """

    # discrete noise levels
    steps: int = field(default=1000, metadata={"range": "[1, inf)"})
    # variance added by the first step
    beta_start: float = field(default=0.00085, metadata={"range": "(0, 1]"})
    # variance added by the last step
    beta_end: float = field(default=0.012, metadata={"range": "(0, 1]"})
    zero_terminal_snr: bool = False  # rescale, so that the last level is pure noise

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.beta_start <= self.beta_end <= 1:
            raise ValueError(
                f"ScaledLinear needs steps >= 1 and 0 < beta_start <= beta_end <= 1, got {self}"
            )

    def __call__(self, t: Float[Arr, "*points"]) -> Point:
        roots = np.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), self.steps)
        betas = tuple((roots**2).tolist())
        return Discrete(zero_terminal_snr(betas) if self.zero_terminal_snr else betas)(t)


@dataclass(frozen=True)
class Cosine:
    """The cosine schedule in continuous time (Nichol & Dhariwal 2021, eq. 17).

    alpha = cos(theta_t) / cos(theta_0) with theta_t = (t + s) / (1 + s) pi / 2; the network is told
    1000 t. Both fields are written without cancellation, so that f32 is enough near either end.

    Raises:
      ValueError: `s` is negative or not finite.
    """

    # offset that keeps the first noise from vanishing
    s: float = field(default=0.008, metadata={"range": "[0, inf)"})
    steps: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not 0 <= self.s < math.inf:
            raise ValueError(f"Cosine needs a finite s >= 0, got {self.s}")

    def __call__(self, t: Float[Arr, "*points"]) -> Point:
        xp = t.__array_namespace__()
        t = xp.clip(t, 0, _LAST_COSINE_TIME)
        quarter = math.pi / 2 / (1 + self.s)
        cos_0 = math.cos(quarter * self.s)
        alpha = xp.sin(quarter * (1 - t)) / cos_0
        # cos^2(u) - cos^2(w) = sin(w - u) sin(w + u)
        variance = xp.sin(quarter * t) * xp.sin(quarter * (t + 2 * self.s)) / cos_0**2
        return Point(alpha, xp.sqrt(variance), 1000 * t)


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight path, alpha = 1 - t and sigma = t (Liu et al. 2022); the network is told 1000 t.

    `shift` first moves time towards noise, as larger images need it: t becomes
    shift t / (1 + (shift - 1) t) (Esser et al. 2024, eq. 23).

    Raises:
      ValueError: `shift` is not positive.
    """

    # moves time towards noise, as larger images need it
    shift: float = field(default=1.0, metadata={"range": "(0, inf)"})
    steps: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"RectifiedFlow needs a finite shift > 0, got {self.shift}")

    def __call__(self, t: Float[Arr, "*points"]) -> Point:
        stretch = 1 + (self.shift - 1) * t
        sigma = self.shift * t / stretch
        return Point((1 - t) / stretch, sigma, 1000 * sigma)
