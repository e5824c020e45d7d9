"""Data for which everything about diffusion is known in closed form."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import Discrete, ScaledLinear
from ldm_jax.diffusion.predictions import per_example
from ldm_jax.types import Denoised

erf = np.vectorize(math.erf)


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

    def cdf(self, x, alpha, sigma):
        """Of x at a point, in f64."""
        spread = np.sqrt(alpha**2 * self.std**2 + sigma**2)
        return (1 + erf((x - alpha * self.mean) / spread / 2**0.5)) / 2


class MixtureData(NamedTuple):
    """Every element of x_0 is drawn from one of several normal distributions."""

    means: tuple[float, ...] = (-0.9, 0.2, 1.1)
    stds: tuple[float, ...] = (0.3, 0.2, 0.4)
    shares: tuple[float, ...] = (0.3, 0.2, 0.5)

    @property
    def mean(self):
        return sum(p * m for p, m in zip(self.shares, self.means, strict=True))

    @property
    def std(self):
        parts = zip(self.shares, self.means, self.stds, strict=True)
        return (sum(p * (m**2 + s**2) for p, m, s in parts) - self.mean**2) ** 0.5

    def denoise(self, x, point):
        """E[x_0 | x] and E[eps | x]: the components' own, weighted by how likely each is given x."""
        parts = zip(self.means, self.stds, strict=True)
        each = [NormalData(mean, std).denoise(x, point) for mean, std in parts]
        log_p = []
        for share, mean, std in zip(self.shares, self.means, self.stds, strict=True):
            variance = per_example(NormalData(mean, std).variance(point))
            residual = x - per_example(point.alpha) * mean
            log_p.append(jnp.log(share) - residual**2 / (2 * variance) - jnp.log(variance) / 2)
        weights = jax.nn.softmax(jnp.stack(log_p), axis=0)
        fields = zip(*each, strict=True)
        return Denoised(*((weights * jnp.stack(field)).sum(0) for field in fields))

    def cdf(self, x, alpha, sigma):
        """Of x at a point, in f64."""
        parts = zip(self.shares, self.means, self.stds, strict=True)
        return sum(p * NormalData(m, s).cdf(x, alpha, sigma) for p, m, s in parts)


class CorrelatedData(NamedTuple):
    """x_0 ~ N(mean, covariance) over the two channels, apart in every place."""

    mean: tuple[float, ...] = (0.7, -0.3)
    covariance: tuple[tuple[float, ...], ...] = ((0.5, 0.3), (0.3, 0.4))

    def _in_basis(self, x, point, factors):
        """What `factors(alpha, sigma, variances)` make of x - alpha mean along the principal axes."""
        variances, basis = np.linalg.eigh(np.array(self.covariance))
        mean, basis = np.array(self.mean, np.float32), basis.astype(np.float32)
        centred = x - per_example(point.alpha) * mean[None, None, None]
        found = factors(point.alpha, point.sigma, variances.astype(np.float32))
        return (centred @ basis * found[None, None, None]) @ basis.T, mean[None, None, None]

    def denoise(self, x, point):
        """E[x_0 | x] and E[eps | x]."""
        part, mean = self._in_basis(x, point, lambda a, s, v: a * v / (a**2 * v + s**2))
        noise, _ = self._in_basis(x, point, lambda a, s, v: s / (a**2 * v + s**2))
        return Denoised(mean + part, noise)

    def consistency(self, x, point):
        """Where the probability flow from x ends, which a consistency model learns, as an x_0."""
        part, mean = self._in_basis(x, point, lambda a, s, v: (v / (a**2 * v + s**2)) ** 0.5)
        return Denoised(mean + part, x)

    def noisiest(self, noise, grid):
        """The latent at a grid's first point that `noise` stands for."""
        alpha, sigma = grid.alpha[0], grid.sigma[0]
        covariance = alpha**2 * np.array(self.covariance) + sigma**2 * np.eye(2)
        return alpha * np.array(self.mean) + noise @ np.linalg.cholesky(covariance).T


def quantile(cdf, u):
    """Where a distribution function reaches u, by bisection in f64."""
    low, high = np.full_like(u, -20.0), np.full_like(u, 20.0)
    for _ in range(60):
        middle = (low + high) / 2
        above = cdf(middle) > u
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return low


@pytest.fixture
def normal_data() -> NormalData:
    return NormalData()


@pytest.fixture
def mixture_data() -> MixtureData:
    return MixtureData()


@pytest.fixture
def correlated_data() -> CorrelatedData:
    return CorrelatedData()


@pytest.fixture
def flow_ends():
    """`flow_ends(data, grid, u)`: where the exact flow begins and ends for elements of quantile u.

    In one dimension the flow keeps the order of all points, and so the quantile.
    """

    def both(data, grid, u):
        ends = (0, -1)
        return tuple(
            quantile(lambda x, i=i: data.cdf(x, grid.alpha[i], grid.sigma[i]), u) for i in ends
        )

    return both
