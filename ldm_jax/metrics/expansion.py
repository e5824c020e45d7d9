"""Scores of whole sets to second order in their samples (von Mises 1947): value, bias, interval, nothing resampled."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ldm_jax.types import Estimate

Features = Float[np.ndarray, "n D"]
Reference = Float[np.ndarray, "m D"]

NORMAL = 1.959964  # half the width of a 95% interval, in standard errors


class Expansion(NamedTuple):
    """A score of sets to second order in their samples.

    Attributes:
      value: the score without its bias of order 1 / n.
      bias: what was taken off: the plug-in score less the value.
      influences: for each set, what each sample adds to the score, times the size of the set; their mean is 0.
      second: the variance of the second order, which alone remains where the first vanishes.
    """

    value: float
    bias: float
    influences: tuple[Float[np.ndarray, " n"], ...]
    second: float

    @property
    def first(self) -> float:
        """The variance of the first order; too large by 2 `second`, since the samples themselves measure it."""
        return float(sum(np.var(each, ddof=1) / len(each) for each in self.influences))

    def estimate(self) -> Estimate:
        """The value with its 95% interval by the normal law; the count is that of the first set."""
        half = NORMAL * np.sqrt(max(self.first - 2 * self.second, 0.0) + self.second)
        return self._within(self.value - half, self.value + half)

    def squared(self) -> Estimate:
        """The same of a squared distance, whose first order has a variance in proportion to the distance itself.

        So the interval holds the distances d with (value - d)^2 <= 1.96^2 (slope d + second), as Wilson's does of
        shares: it covers also where the distance is of the size of its error, and is not symmetric there.
        """
        slope = self._slope()
        middle = self.value + NORMAL**2 * slope / 2
        spread = slope * self.value + NORMAL**2 * slope**2 / 4 + self.second
        half = NORMAL * np.sqrt(max(spread, 0.0))
        # Far below 0 the value is beside all distances that there can be.
        return self._within(min(middle - half, self.value), middle + half)

    def _slope(self) -> float:
        """What the first order's variance grows by per unit of the distance."""
        # Noise adds to both in nearly this ratio: a slope also where the distance is lost in it.
        slope = self.first / max(self.value + self.bias, np.finfo(float).tiny)
        if self.value > 2 * np.sqrt(self.second):  # the sets are apart: noise can be taken off both
            slope = max(slope, (self.first - 2 * self.second) / self.value)
        return slope

    def _within(self, low: float, high: float) -> Estimate:
        return Estimate(self.value, float(low), float(high), len(self.influences[0]))


def checked(features: Features) -> Features:
    """The features in float64; raises ValueError where one is NaN or infinite."""
    features = np.asarray(features, np.float64)
    broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(broken):
        raise ValueError(
            f"features of {len(broken)} of {len(features)} samples are NaN or infinite, "
            f"the first of them at index {broken[0]}; a score of the set needs all of them finite"
        )
    return features
