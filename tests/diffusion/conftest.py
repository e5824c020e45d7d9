"""Normal data, for which everything about diffusion is known in closed form."""

from typing import NamedTuple

import pytest

from ldm_jax.diffusion import Discrete, ScaledLinear
from ldm_jax.diffusion.predictions import per_example
from ldm_jax.types import Denoised


class NormalData(NamedTuple):
    """x_0 ~ N(mean, std^2) in every element, so that x ~ N(alpha mean, alpha^2 std^2 + sigma^2)."""

    mean: float = 0.7
    std: float = 0.5

    def variance(self, point):
        """Of x at a point."""
        return point.alpha**2 * self.std**2 + point.sigma**2

    def denoise(self, x, point):
        """E[x_0 | x] and E[eps | x]."""
        alpha, sigma, variance = (
            per_example(c) for c in (point.alpha, point.sigma, self.variance(point))
        )
        residual = (x - alpha * self.mean) / variance
        return Denoised(self.mean + alpha * self.std**2 * residual, sigma * residual)

    def network(self, schedule, prediction):
        """The `apply` that a perfectly trained network would be; it finds t from what it is told."""

        def apply(params, x, told, context):
            discrete = isinstance(schedule, ScaledLinear | Discrete)
            t = (told + 0.5) / schedule.steps if discrete else told / 1000
            point = schedule(t)
            a, b = prediction(point)
            x_0, eps = self.denoise(x, point)
            return per_example(a) * x_0 + per_example(b) * eps

        return apply

    def noisiest(self, noise, grid):
        """The latent at a grid's first point that `noise` stands for."""
        return grid.alpha[0] * self.mean + self.variance(grid)[0] ** 0.5 * noise


@pytest.fixture
def normal_data() -> NormalData:
    return NormalData()
