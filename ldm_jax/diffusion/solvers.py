"""Samplers of second order: solvers of the probability flow dx = x_0 d alpha + eps d sigma."""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.walk import Memoryless, Row, Step, at, moved
from ldm_jax.types import Denoise, Keys, Latent, Point

SOLVERS = ("midpoint", "heun")
VARIABLES = ("path", "ratio")
_FEW = 15  # steps below which DPM-Solver++ ends with one of first order


@dataclass(frozen=True)
class DPMpp(Memoryless):
    """DPM-Solver++, multistep, of order 1 or 2 (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

    In the log-SNR l = log(alpha / sigma) the flow is an integral of x_0 alone. Order 1 takes x_0 as
    constant over a step h of l, which is DDIM. Order 2 adds its slope over the step h_0 before:
    gain h / (2 h_0) times the change of x_0 (`solver` midpoint, the paper's), or
    (alpha_s h - gain) / h_0 times it (heun, exact if x_0 were linear in l), with
    gain = alpha_s (1 - e^-h) = alpha_s - alpha_t sigma_s / sigma_t.

    Steps that touch a point without signal or without noise are of order 1, as h is infinite there,
    which does not lower the order of the walk.

    Raises:
      ValueError: `order` is neither 1 nor 2, or `solver` is unknown.
    """

    # 1 or 2
    order: int = field(default=2, metadata={"range": "[1, 2]"})
    # how the slope of x_0 enters at order 2: midpoint or heun
    solver: str = field(default="midpoint", metadata={"names": SOLVERS})
    lower_order_final: bool = True  # the last of fewer than 15 steps is of order 1

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"DPMpp needs order 1 or 2, got {self.order}")
        if self.solver not in SOLVERS:
            raise ValueError(f"DPMpp's solver can be {' or '.join(SOLVERS)}, got {self.solver!r}")

    def init(self, x: Latent) -> Latent | None:
        return jnp.zeros_like(x) if self.order == 2 else None  # x_0 at the point before

    def step(
        self, denoise: Denoise, x: Latent, carry: Latent | None, grid: Point, i: Step, keys: Keys
    ) -> tuple[Latent, Latent | None]:
        denoised = denoise(x, at(grid, i))
        x = moved(denoised, grid, i)
        if self.order == 1:
            return x, None
        return x + at(self._slope(grid), i) * (denoised.x_0 - carry), denoised.x_0

    def _slope(self, grid: Point) -> Row:
        """What each step adds of the last change of x_0; 0 where it is of order 1."""
        xp = grid.alpha.__array_namespace__()
        mixed = (grid.alpha > 0) & (grid.sigma > 0)
        alpha, sigma = xp.where(mixed, grid.alpha, 1.0), xp.where(mixed, grid.sigma, 1.0)
        h = xp.diff(xp.log(alpha / sigma))
        second = xp.concat([np.zeros(1, bool), mixed[:-2] & mixed[1:-1] & mixed[2:]])
        if self.lower_order_final and len(h) < _FEW:
            second &= np.arange(len(h)) < len(h) - 1
        before = xp.where(second, xp.roll(h, 1), 1.0)
        gain = alpha[1:] - alpha[:-1] * sigma[1:] / sigma[:-1]
        weight = gain / 2 * h if self.solver == "midpoint" else alpha[1:] * h - gain
        return xp.where(second, weight / before, 0.0)


@dataclass(frozen=True)
class Heun(Memoryless):
    """Heun's method: an Euler step, then the mean of the slopes at its two ends.

    `variable` says in what: in the "path", x itself, whose slope is x_0 d alpha + eps d sigma,
    which on rectified flow is the velocity's; or in the "ratio", x / alpha over sigma / alpha, as
    Karras et al. (2022, algorithm 1) and diffusers' HeunDiscrete have it, which needs some signal
    where the walk starts. A step evaluates twice, and the last one, which is Euler's, once.

    Raises:
      ValueError: `variable` is unknown.
    """

    # what the step is straight in: path or ratio (of noise to signal)
    variable: str = field(default="path", metadata={"names": VARIABLES})
    order: ClassVar[int] = 2
    stages: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.variable not in VARIABLES:
            raise ValueError(
                f"Heun's variable can be {' or '.join(VARIABLES)}, got {self.variable!r}"
            )

    def check(self, grid: Point) -> None:
        """Raises ValueError where the ratio of noise to signal is infinite."""
        if self.variable == "ratio" and grid.alpha[0] == 0:
            raise ValueError(
                "Heun in the ratio of noise to signal cannot start where there is no signal, as this grid does: "
                "choose variable='path', or a spacing that starts later (Karras, LogSNR)"
            )

    def step(
        self, denoise: Denoise, x: Latent, carry: None, grid: Point, i: Step, keys: Keys
    ) -> tuple[Latent, None]:
        last = len(grid.alpha) - 2
        here = denoise(x, at(grid, i))
        guess = moved(here, grid, i)

        def corrected() -> Latent:
            # Never at the last point, even if `vmap` turns the choice into a computation of both.
            there = denoise(guess, at(grid, jnp.minimum(i + 1, last)))
            by_x_0, by_eps = (at(half, i) for half in self._halves(grid))
            return guess + by_x_0 * (there.x_0 - here.x_0) + by_eps * (there.eps - here.eps)

        return jax.lax.cond(i < last, corrected, lambda: guess), None

    def _halves(self, grid: Point) -> tuple[Row, Row]:
        """Half of the way in x_0 and in eps, at the scale of the step's end."""
        xp = grid.alpha.__array_namespace__()
        if self.variable == "path":
            return xp.diff(grid.alpha) / 2, xp.diff(grid.sigma) / 2
        ratio = grid.sigma / grid.alpha
        return xp.zeros_like(ratio[1:]), grid.alpha[1:] * xp.diff(ratio) / 2
