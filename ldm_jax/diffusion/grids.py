"""Grids: the points that a sampler walks, made on the host in f64, the noisiest first.

A grid for S steps has S + 1 points. At the last one the walk is over: what a network would be told
there is never used.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Shaped

from ldm_jax.diffusion.schedules import Schedule
from ldm_jax.types import Point

_CLEAN = Point(1.0, 0.0, 0.0)  # what the network is told there is never used


@runtime_checkable
class Spacing(Protocol):
    """A choice of S + 1 points of a schedule."""

    def __call__(self, schedule: Schedule, steps: int) -> Point: ...


def grid(schedule: Schedule, spacing: Spacing, steps: int) -> Point:
    """The points of a walk from noise to data: NumPy f64 fields of length steps + 1.

    Raises:
      ValueError: fewer than 1 step, or more than this spacing can take of this schedule.
    """
    if steps < 1:
        raise ValueError(f"a grid needs at least 1 step, got {steps}")
    return spacing(schedule, steps)


@dataclass(frozen=True)
class Leading:
    """Every (schedule.steps // S)-th index from `offset` up: how Stable Diffusion meets DDIM.

    The walk ends at index 0, which still holds a trace of noise (diffusers'
    `set_alpha_to_one=False`), or at the clean image.
    """

    # the lowest index
    offset: int = field(default=1, metadata={"range": "[0, inf)"})
    ends_clean: bool = False  # end at the clean image, not at index 0
    # lowest indices left out: 1 as in diffusers' DPMSolverMultistep
    skipped: int = field(default=0, metadata={"range": "[0, inf)"})

    def __post_init__(self) -> None:
        _check_skipped(self)
        if self.offset < 0:
            raise ValueError(f"Leading needs offset >= 0, got {self.offset}")

    def __call__(self, schedule: Schedule, steps: int) -> Point:
        total = _indices(schedule, self, steps)
        stride = total // (steps + self.skipped)
        index = (np.arange(steps)[::-1] + self.skipped) * stride + self.offset
        if not 0 <= index[-1] <= index[0] < total:
            raise ValueError(
                f"{self} with {steps} steps needs the indices {index[-1]} to {index[0]}, "
                f"but {type(schedule).__name__} has 0 to {total - 1}"
            )
        return _walk(schedule, index, self.ends_clean)


@dataclass(frozen=True)
class Trailing:
    """Every (schedule.steps / S)-th index from the last one down (Lin et al. 2023, table 2).

    The walk starts at the noisiest point, unlike a leading one, and ends at the clean image or at
    index 0.
    """

    ends_clean: bool = True  # end at the clean image, not at index 0

    def __call__(self, schedule: Schedule, steps: int) -> Point:
        total = _indices(schedule, self, steps)
        # The very sum that diffusers rounds: ties must fall the same way.
        index = np.round(np.arange(total, 0, -total / steps)[:steps]) - 1
        return _walk(schedule, index, self.ends_clean)


@dataclass(frozen=True)
class Linspace:
    """S indices evenly from the last one down to 0, then the clean image.

    Where they are no whole numbers they are rounded, as diffusers' DDIM, DDPM and DPMSolverMultistep
    do, or the points lie `between` two indices, as in diffusers' Euler and Heun schedulers.
    """

    # lowest indices left out: 1 as in diffusers' DPMSolverMultistep
    skipped: int = field(default=0, metadata={"range": "[0, inf)"})
    between: bool = (
        False  # points between indices, whose ratios of noise to signal are interpolated
    )

    def __post_init__(self) -> None:
        _check_skipped(self)

    def __call__(self, schedule: Schedule, steps: int) -> Point:
        total = _indices(schedule, self, steps)
        if steps + self.skipped < 2:
            raise ValueError(f"{self} needs at least 2 steps for its two ends, got {steps}")
        index = np.linspace(0, total - 1, steps + self.skipped)[self.skipped :][::-1]
        if not self.between:
            return _walk(schedule, np.round(index), ends_clean=True)
        ratios = np.interp(index, np.arange(total), _levels(schedule, total))
        return _ended(_of_ratios(ratios, told=index), _CLEAN)


@dataclass(frozen=True)
class Distilled:
    """Indices that latent consistency models are distilled for (Luo et al. 2023), then the image.

    Of the `original` indices evenly up to the last one, S evenly from that one down.

    Raises:
      ValueError: `original` is less than 1.
    """

    # indices of the distillation
    original: int = field(default=50, metadata={"range": "[1, inf)"})

    def __post_init__(self) -> None:
        if self.original < 1:
            raise ValueError(f"Distilled needs at least 1 original index, got {self.original}")

    def __call__(self, schedule: Schedule, steps: int) -> Point:
        total = _indices(schedule, self, max(steps, self.original))
        if steps > self.original:
            raise ValueError(f"{self} serves at most {self.original} steps, got {steps}")
        place = self.original - np.floor(np.linspace(0, self.original, steps, endpoint=False))
        return _walk(schedule, place * (total // self.original) - 1, ends_clean=True)


@dataclass(frozen=True)
class Even:
    """S times of a continuous schedule, evenly from 1 to `last`, then the clean image at 0.

    diffusers' FlowMatchEulerDiscrete for Stable Diffusion 3 is `RectifiedFlow(shift=3)` with the last
    time at the shifted 1/1000, 3/1002.

    Raises:
      ValueError: `last` lies outside (0, 1).
    """

    # the time at which the last step starts; none: 1 / S
    last: float | None = field(default=None, metadata={"range": "(0, 1)"})

    def __post_init__(self) -> None:
        if self.last is not None and not 0 < self.last < 1:
            raise ValueError(f"Even needs its last time in (0, 1), got {self.last}")

    def __call__(self, schedule: Schedule, steps: int) -> Point:
        if schedule.steps is not None:
            raise ValueError(
                f"{self} needs continuous time, but {type(schedule).__name__} has {schedule.steps} "
                "indices: use Leading, Trailing or Linspace"
            )
        if self.last is None:
            return schedule(np.linspace(1, 0, steps + 1))
        return schedule(np.append(np.linspace(1, self.last, steps), 0.0))


@dataclass(frozen=True)
class Karras:
    """Ratios u = sigma / alpha with u^(1/rho) evenly spaced, then the clean image.

    Karras et al. (2022, eq. 5). The walk keeps within the schedule's own ratios, and within `lowest`
    to `highest` where those are infinite or 0.

    Raises:
      ValueError: not rho > 0, or not 0 < lowest < highest.
    """

    # the larger, the more steps near the image
    rho: float = field(default=7.0, metadata={"range": "(0, inf)"})
    # ratio of noise to signal before the last step, if the schedule goes lower
    lowest: float = field(default=0.002, metadata={"range": "(0, inf)"})
    # ratio of noise to signal at the start, if the schedule goes higher
    highest: float = field(default=80.0, metadata={"range": "(0, inf)"})
    whole: bool = False  # tell the network the nearest index, as diffusers' DPMSolverMultistep does

    def __post_init__(self) -> None:
        if not 0 < self.rho < math.inf:
            raise ValueError(f"Karras needs a finite rho > 0, got {self.rho}")
        _check_ratios(self)

    def __call__(self, schedule: Schedule, steps: int) -> Point:
        low, high = _range(schedule, self)
        ratios = np.linspace(high ** (1 / self.rho), low ** (1 / self.rho), steps) ** self.rho
        return _at_ratios(schedule, ratios, self.whole)


@dataclass(frozen=True)
class LogSNR:
    """Points evenly spaced in the log of the signal-to-noise ratio, then the clean image.

    Lu et al. (2022, arXiv:2206.00927); diffusers' `use_lu_lambdas` and `use_exponential_sigmas`.
    The walk keeps within the schedule's own ratios, and within `lowest` to `highest` where those are
    infinite or 0.

    Raises:
      ValueError: not 0 < lowest < highest.
    """

    # ratio of noise to signal before the last step, if the schedule goes lower
    lowest: float = field(default=0.002, metadata={"range": "(0, inf)"})
    # ratio of noise to signal at the start, if the schedule goes higher
    highest: float = field(default=80.0, metadata={"range": "(0, inf)"})
    whole: bool = False  # tell the network the nearest index, as diffusers' DPMSolverMultistep does

    def __post_init__(self) -> None:
        _check_ratios(self)

    def __call__(self, schedule: Schedule, steps: int) -> Point:
        low, high = _range(schedule, self)
        ratios = np.exp(np.linspace(np.log(high), np.log(low), steps))
        return _at_ratios(schedule, ratios, self.whole)


def _indices(schedule: Schedule, spacing: Spacing, steps: int) -> int:
    """How many indices the schedule has, if it can serve `steps` steps."""
    if schedule.steps is None:
        raise ValueError(f"{spacing} picks indices, but {schedule} is continuous: use Even")
    if steps > schedule.steps:
        raise ValueError(
            f"{spacing} with {steps} steps: {type(schedule).__name__} has only {schedule.steps}"
        )
    return schedule.steps


def _walk(schedule: Schedule, index: Shaped[np.ndarray, " S"], ends_clean: bool) -> Point:
    # The middle of an index's interval of time: no rounding can move it to a neighbour.
    points = schedule((index + 0.5) / schedule.steps)
    return _ended(points, _CLEAN if ends_clean else schedule(np.zeros(1)))


def _ended(points: Point, end: Point) -> Point:
    return Point(*(np.append(row, last) for row, last in zip(points, end, strict=True)))


def _check_skipped(spacing: Leading | Linspace) -> None:
    if spacing.skipped < 0:
        raise ValueError(f"{type(spacing).__name__} needs skipped >= 0, got {spacing.skipped}")


def _check_ratios(spacing: Karras | LogSNR) -> None:
    if not 0 < spacing.lowest < spacing.highest < math.inf:
        raise ValueError(
            f"{type(spacing).__name__} needs 0 < lowest < highest < inf, ratios of noise to signal, got "
            f"{spacing.lowest} and {spacing.highest}"
        )


def _range(schedule: Schedule, spacing: Karras | LogSNR) -> tuple[float, float]:
    """The lowest and the highest ratio of noise to signal that a walk visits before its end."""
    low, high = _ratio(schedule(np.array([0.0, 1.0])))
    low, high = max(low, spacing.lowest), min(high, spacing.highest)
    if low >= high:
        raise ValueError(f"{spacing} leaves nothing of {schedule}: lowest and highest exclude it")
    return low, high


def _ratio(point: Point) -> Float[np.ndarray, " n"]:
    with np.errstate(divide="ignore"):
        return point.sigma / point.alpha


def _at_ratios(schedule: Schedule, ratios: Float[np.ndarray, " S"], whole: bool) -> Point:
    """The points of a schedule with these ratios of noise to signal, and the clean end."""
    if schedule.steps is None:
        return _ended(schedule(_times(schedule, ratios)), _CLEAN)
    levels = _levels(schedule, schedule.steps)
    # What the network is told lies between two indices.
    told = np.interp(np.log(ratios), np.log(levels), np.arange(float(schedule.steps)))
    return _ended(_of_ratios(ratios, np.round(told) if whole else told), _CLEAN)


def _levels(schedule: Schedule, total: int) -> Float[np.ndarray, " total"]:
    """The ratios of noise to signal at all indices."""
    return _ratio(schedule((np.arange(total) + 0.5) / total))


def _of_ratios(ratios: Float[np.ndarray, " S"], told: Float[np.ndarray, " S"]) -> Point:
    """Points of a schedule that preserves variance, as all discrete ones do."""
    alpha = 1 / np.sqrt(1 + ratios**2)
    return Point(alpha, ratios * alpha, told)


def _times(schedule: Schedule, ratios: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """The times of these ratios, which rise with time, by bisection down to the last bit."""
    low, high = np.zeros_like(ratios), np.ones_like(ratios)
    for _ in range(64):
        middle = (low + high) / 2
        above = _ratio(schedule(middle)) > ratios
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return high
