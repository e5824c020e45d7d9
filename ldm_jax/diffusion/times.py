"""Distributions of the training time t, each a map from a uniform number to t (its quantiles)."""

from collections.abc import Callable
from dataclasses import dataclass

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
      ValueError: `std` is not positive.
    """

    mean: float = 0.0  # of the logit of t
    std: float = 1.0  # of the logit of t

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"LogitNormal needs std > 0, got {self.std}")

    def __call__(self, u: PerExample) -> Float[Array, " B"]:
        return jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(u))
