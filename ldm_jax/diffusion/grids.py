"""Grids: the points that a sampler walks, made on the host in f64, the noisiest first.

A grid for S steps has S + 1 points. At the last one the walk is over: what a network would be told
there is never used.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from ldm_jax.diffusion.schedules import Schedule
from ldm_jax.types import Point


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

    offset: int = 1  # the lowest index
    ends_clean: bool = False  # end at the clean image, not at index 0

    def __call__(self, schedule: Schedule, steps: int) -> Point:
        total = _indices(schedule, self, steps)
        index = np.arange(steps)[::-1] * (total // steps) + self.offset
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
    """S indices evenly from the last one down to 0, then the clean image."""

    def __call__(self, schedule: Schedule, steps: int) -> Point:
        total = _indices(schedule, self, steps)
        if steps < 2:
            raise ValueError(f"{self} needs at least 2 steps for its two ends, got {steps}")
        index = np.round(np.linspace(0, total - 1, steps))[::-1]
        return _walk(schedule, index, ends_clean=True)


@dataclass(frozen=True)
class Even:
    """Times of a continuous schedule, evenly from 1 to 0."""

    def __call__(self, schedule: Schedule, steps: int) -> Point:
        if schedule.steps is not None:
            raise ValueError(
                f"{self} needs continuous time, but {type(schedule).__name__} has {schedule.steps} "
                "indices: use Leading, Trailing or Linspace"
            )
        return schedule(np.linspace(1, 0, steps + 1))


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
    end = Point(1.0, 0.0, 0.0) if ends_clean else schedule(np.zeros(1))
    return Point(*(np.append(row, last) for row, last in zip(points, end, strict=True)))
