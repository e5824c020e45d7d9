"""The record of a cell of a study's grid, a line of its ledger."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.types import Estimate


@dataclasses.dataclass(frozen=True)
class SamplingRecord:
    """Images of one model drawn in one way with one seed: a cell of a study's grid, and what came of it."""

    study: str
    grid: str  # digest of all that decides the cells of the study
    commit: str  # of the code that drew; empty where unknown
    chips: str  # kind and number
    model: str  # its name in the study
    params: int
    examples: int  # seen in training
    sampler: str
    steps: int
    guidance: float
    seed: int
    cost: float  # evaluations of the network for an image, a pair counting once, times the cost of one
    flops: float  # of the network for an image, of both branches of guidance
    seconds: float | None  # for an image, looked at too, on all chips; None: compiling was in it
    scores: Mapping[str, Estimate]
    values: Mapping[str, Sequence[float]]  # numbers by prompt, whose mean is the score of that name
    cells: int = 0  # of the whole grid; 0: not known

    @property
    def group(self) -> tuple[str, str, str]:
        """What has to be alike in records that stand in one figure."""
        return self.study, self.grid, self.commit

    @property
    def place(self) -> tuple[str, str, int, float, int]:
        """The cell within its grid."""
        return self.model, self.sampler, self.steps, self.guidance, self.seed

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two records the same cell."""
        return self.group, self.place
