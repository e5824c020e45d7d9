"""What data says of a finding: confirmed, refuted, or not decided by this much of it."""

import enum

from ldm_jax.types import Estimate


class Verdict(enum.Enum):
    """The three answers; the value is how people read it."""

    CONFIRMED = "confirmed"
    REFUTED = "refuted"
    UNDECIDED = "not decided by this much data"


def above(estimate: Estimate, bound: float) -> Verdict:
    """Whether a quantity is above a bound: by its 95% interval, all of it on one side. NaN decides nothing."""
    if estimate.low > bound:
        return Verdict.CONFIRMED
    return Verdict.REFUTED if estimate.high < bound else Verdict.UNDECIDED
