"""Samplers: how to walk a grid from noise to data with a denoiser.

A sampler knows neither the schedule nor the network. Its coefficients are functions of the whole
grid, computed in the precision in which that is given: f64 on the host, unless the grid is traced.
None divides by alpha of the point it leaves, so a walk may start at pure noise.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from ldm_jax.diffusion.draws import gaussian
from ldm_jax.types import Arr, Denoise, Keys, Latent, Point

Step = int | Integer[Arr, ""]
Row = Float[Arr, " S"]


@runtime_checkable
class Sampler(Protocol):
    """A rule for one step of a walk.

    `order`: with an exact denoiser and no noise, the error of S steps falls as S^-order. `init`
    makes what the rule remembers between steps, and `step` takes one, from point i to i + 1.
    """

    order: int

    def init(self, x: Latent) -> Any: ...

    def step(
        self, denoise: Denoise, x: Latent, carry: Any, grid: Point, i: Step, keys: Keys
    ) -> tuple[Latent, Any]: ...


def sample(denoise: Denoise, x_1: Latent, grid: Point, keys: Keys, sampler: Sampler) -> Latent:
    """Walks the grid from `x_1` at its first point to its last; pure, one `lax.scan`.

    `x_1` should have the variance alpha^2 + sigma^2 of a noisy latent whose data has unit variance:
    that is `initial_noise` as it is if the schedule preserves variance or the walk starts at pure
    noise. `keys` holds one key a prompt; the noise of step i is drawn from `fold_in(key, i)`.
    """

    def body(state: tuple[Latent, Any], i: Integer[Array, ""]) -> tuple[tuple[Latent, Any], None]:
        x, carry = state
        return sampler.step(denoise, x, carry, grid, i, keys), None

    start = jnp.asarray(x_1, jnp.float32)
    (x, _), _ = jax.lax.scan(body, (start, sampler.init(start)), jnp.arange(len(grid.alpha) - 1))
    return x


def initial_noise(keys: Keys, shape: tuple[int, int, int]) -> Latent:
    """Standard normal latents [B, *shape], one key a prompt.

    The same keys may go to `sample`, which draws other noise from them.
    """
    return _noise(keys, jnp.uint32(0xFFFFFFFF), shape)  # no step has this number


@dataclass(frozen=True)
class DDIM:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12).

    `eta` is the share of the ancestral noise (eq. 16), from 0 (none) to 1 (as DDPM).

    Raises:
      ValueError: `eta` lies outside [0, 1].
    """

    eta: float = 0.0  # share of the ancestral noise, 0 to 1
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIM needs eta in [0, 1], got {self.eta}")

    def init(self, x: Latent) -> None:
        return None

    def step(
        self, denoise: Denoise, x: Latent, carry: None, grid: Point, i: Step, keys: Keys
    ) -> tuple[Latent, None]:
        alpha_s, sigma_s = grid.alpha[1:], grid.sigma[1:]
        fresh = self.eta**2 * _posterior(grid)
        x_0, eps = denoise(x, _at(grid, i))
        x = _at(alpha_s, i) * x_0 + _at(sigma_s * (1 - fresh) ** 0.5, i) * eps
        if self.eta:
            x += _at(sigma_s * fresh**0.5, i) * _noise(keys, i, x.shape[1:])
        return x, None


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling: x_s is drawn from q(x_s | x_t, x_0) with the predicted x_0.

    It is Ho et al. (2020, eq. 6 and 7, the small fixed variance) for any alpha and sigma. From s to
    the noisier t, x_t = r x_s + q n with r = alpha_t / alpha_s and q^2 = sigma_t^2 - r^2 sigma_s^2,
    so by Bayes' rule x_s has the mean (alpha_s q^2 x_0 + r sigma_s^2 x_t) / sigma_t^2 and the
    variance sigma_s^2 q^2 / sigma_t^2.
    """

    order: ClassVar[int] = 1

    def init(self, x: Latent) -> None:
        return None

    def step(
        self, denoise: Denoise, x: Latent, carry: None, grid: Point, i: Step, keys: Keys
    ) -> tuple[Latent, None]:
        alpha_s, sigma_s = grid.alpha[1:], grid.sigma[1:]
        fresh = _posterior(grid)
        kept = _ratio(grid) * sigma_s**2 / grid.sigma[:-1] ** 2
        x_0 = denoise(x, _at(grid, i)).x_0
        mean = _at(alpha_s * fresh, i) * x_0 + _at(kept, i) * x
        return mean + _at(sigma_s * fresh**0.5, i) * _noise(keys, i, x.shape[1:]), None


def _ratio(grid: Point) -> Row:
    """alpha_t / alpha_s for every step, from point t of the grid to the next one s."""
    return grid.alpha[:-1] / grid.alpha[1:]


def _posterior(grid: Point) -> Row:
    """The variance of q(x_s | x_t, x_0) for every step, as a share of sigma_s^2: q^2 / sigma_t^2."""
    variance_t, variance_s = grid.sigma[:-1] ** 2, grid.sigma[1:] ** 2
    return (variance_t - _ratio(grid) ** 2 * variance_s) / variance_t


def _at(rows: Any, i: Step) -> Any:
    """Entry i of every row, in f32."""
    return jax.tree.map(lambda row: jnp.asarray(row, jnp.float32)[i], rows)


def _noise(keys: Keys, i: Step, shape: tuple[int, ...]) -> Latent:
    return gaussian(jax.vmap(jax.random.fold_in, (0, None))(keys, i), shape)
