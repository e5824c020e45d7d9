"""The record of a finished run, a line of its ledger."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ldm_jax.types import Estimate


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run was, what it cost, and what came of it."""

    study: str  # the question that it belongs to
    config: Mapping[str, Any]  # as its config.json has it
    commit: str  # of the code; empty where unknown
    chips: str  # kind and number, as "TPU v5p x 8"
    seed: int
    params: int  # of the trained network
    flops: float  # of the training, in all
    examples: int  # seen in training
    seconds: float  # of the training, waiting included
    losses: Mapping[str, float]  # the last training loss, and those of validation
    scores: Mapping[str, Estimate]

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What makes two records the same run."""
        return self.study, json.dumps(self.config, sort_keys=True), self.seed, self.examples
