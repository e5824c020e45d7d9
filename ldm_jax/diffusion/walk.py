"""The walk from noise to data that all samplers share: one `lax.scan` over the points of a grid."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from ldm_jax.diffusion.draws import gaussian
from ldm_jax.diffusion.guidance import EVERYWHERE, Interval, Limited, guided_steps, segments
from ldm_jax.types import Arr, Denoise, Denoised, Keys, Latent, Point

Step = int | Integer[Arr, ""]
Row = Float[Arr, " S"]
SPREAD = 0.5  # standard deviation of the data that tells rules apart
Progress = Callable[[Step], None]


@runtime_checkable
class Sampler(Protocol):
    """A rule for one step of a walk.

    `order`: with an exact denoiser and no noise, the error of S steps falls as S^-order; 0 if the
    rule asks for a consistency function instead. `stages`: how often a step evaluates the denoiser;
    the last one does so once. `init` makes what the rule remembers between steps, and `step` takes
    one, from point i to i + 1. `check` raises a ValueError if the rule is not defined on a grid.
    """

    order: int
    stages: int

    def check(self, grid: Point) -> None: ...

    def init(self, x: Latent) -> Any: ...

    def step(
        self, denoise: Denoise, x: Latent, carry: Any, grid: Point, i: Step, keys: Keys
    ) -> tuple[Latent, Any]: ...


class Memoryless:
    """What the samplers share that evaluate once a step, remember nothing and walk any grid."""

    order: int = 1
    stages: int = 1

    def check(self, grid: Point) -> None:
        return None

    def init(self, x: Latent) -> None:
        return None


def sample(
    denoise: Denoise | Limited,
    x_1: Latent,
    grid: Point,
    keys: Keys,
    sampler: Sampler,
    progress: Progress | None = None,
) -> Latent:
    """Walks the grid from `x_1` at its first point to its last; pure, one `lax.scan`.

    `x_1` should have the variance alpha^2 + sigma^2 of a noisy latent whose data has unit variance:
    that is `initial_noise` as it is if the schedule preserves variance or the walk starts at pure
    noise. `keys` holds one key a prompt; the noise of step i is drawn from `fold_in(key, i)`.
    Where guidance is limited to an interval, each of the (at most three) segments of the walk has a
    scan of its own.

    `progress(i)` is called on the host as step i begins, once whatever the number of devices; without
    it nothing of it is in the program. `jax.effects_barrier()` waits for the last call.

    Raises:
      ValueError: `check_walk` refuses the grid, or guidance is limited and the grid is traced.
    """
    check_walk(sampler, grid)
    start = jnp.asarray(x_1, jnp.float32)
    state = start, sampler.init(start)
    for part, first, end in segments(denoise, grid):
        state = _scan(part, state, grid, keys, sampler, jnp.arange(first, end), progress)
    return state[0]


def _scan(
    denoise: Denoise,
    state: tuple[Latent, Any],
    grid: Point,
    keys: Keys,
    sampler: Sampler,
    steps: Integer[Array, " steps"],
    progress: Progress | None,
) -> tuple[Latent, Any]:
    def body(state: tuple[Latent, Any], i: Integer[Array, ""]) -> tuple[tuple[Latent, Any], None]:
        if progress is not None:
            jax.debug.callback(progress, i)
        return sampler.step(denoise, *state, grid, i, keys), None

    return jax.lax.scan(body, state, steps)[0]


def check_walk(sampler: Sampler, grid: Point) -> None:
    """Refuses a sampler on a grid where it is not defined; a traced grid cannot be looked at.

    Raises:
      ValueError: a point but the first has no signal, or one but the last no noise, or what the
        sampler itself refuses.
    """
    if any(isinstance(row, jax.core.Tracer) for row in grid):
        return
    if not (np.all(grid.alpha[1:] > 0) and np.all(grid.sigma[:-1] > 0)):
        raise ValueError(
            "a walk needs signal at all of its points but the first and noise at all but the last, got "
            f"alpha {grid.alpha} and sigma {grid.sigma}"
        )
    sampler.check(grid)


def walk_on_normal_data(sampler: Sampler, grid: Point) -> Float[np.ndarray, "4"]:
    """Returns where four walks end with the exact denoiser of normal data, the same noise for every sampler.

    That denoiser is linear, so that two rules end alike on a grid only if their coefficients there are the same.
    Raises ValueError as `check_walk`.
    """

    def denoise(x: Latent, point: Point) -> Denoised:
        signal = point.alpha * SPREAD**2
        x_0 = signal / (signal * point.alpha + point.sigma**2) * x
        return Denoised(x_0, (x - point.alpha * x_0) / point.sigma)

    keys = jax.random.split(jax.random.key(0), 4)
    with jax.disable_jit():  # of a few numbers, which are not worth compiling
        return np.ravel(sample(denoise, initial_noise(keys, (1, 1, 1)), grid, keys, sampler))


def evaluations(sampler: Sampler, grid: Point, interval: Interval = EVERYWHERE) -> int:
    """How many latents the network sees for one guided image; both branches count where both run."""
    return int(np.sum(calls(sampler, grid) * np.where(guided_steps(grid, interval), 2, 1)))


def calls(sampler: Sampler, grid: Point) -> Int[np.ndarray, " S"]:
    """How often each step of a walk calls the denoiser; a guided call sees a latent twice."""
    stages = np.full(len(grid.alpha) - 1, sampler.stages)
    stages[-1] = 1
    return stages


def initial_noise(keys: Keys, shape: tuple[int, int, int]) -> Latent:
    """Standard normal latents [B, *shape], one key a prompt.

    The same keys may go to `sample`, which draws other noise from them.
    """
    return step_noise(keys, jnp.uint32(0xFFFFFFFF), shape)  # no step has this number


def step_noise(keys: Keys, i: Step, shape: tuple[int, ...]) -> Latent:
    """The noise of step i, standard normal [B, *shape]."""
    return gaussian(jax.vmap(jax.random.fold_in, (0, None))(keys, i), shape)


def at(rows: Any, i: Step) -> Any:
    """Entry i of every row, in f32."""
    return jax.tree.map(lambda row: jnp.asarray(row, jnp.float32)[i], rows)


def moved(denoised: Denoised, grid: Point, i: Step) -> Latent:
    """Where step i ends if x_0 and eps stay as they are: alpha x_0 + sigma eps at point i + 1."""
    return at(grid.alpha[1:], i) * denoised.x_0 + at(grid.sigma[1:], i) * denoised.eps
