"""Distributions of the training time t, each a map from a uniform number to t (its quantiles)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Float

from ldm_jax.types import PerExample

Times = Callable[[PerExample], PerExample]


@dataclass(frozen=True)
class Uniform:
    """All times alike."""

    def __call__(self, u: PerExample) -> PerExample:
        return u


@dataclass(frozen=True)
class LogitNormal:
    """A normal logit: the middle of the path is trained most (Esser et al. 2024, eq. 19).

    Raises:
      ValueError: `std` is not positive, or a number is not finite.
    """

    # of the logit of t
    mean: float = field(default=0.0, metadata={"range": "(-inf, inf)"})
    # of the logit of t
    std: float = field(default=1.0, metadata={"range": "(0, inf)"})

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise ValueError(f"LogitNormal needs a finite std > 0, got {self.std}")
        if not math.isfinite(self.mean):
            raise ValueError(f"LogitNormal needs a finite mean, got {self.mean}")

    def __call__(self, u: PerExample) -> Float[Array, " B"]:
        return jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(u))
