"""Is one run better than another on the same prompts and noise? Paired differences and permutation tests."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ldm_jax.metrics.estimate import mean_estimate
from ldm_jax.metrics.expansion import Expansion, Features, Reference
from ldm_jax.types import Estimate

# By six lines of our own: scipy's permutation_test takes minutes for the 30 000 prompts of COCO.
RESAMPLES, BATCH = 10_000, 100


class Paired(NamedTuple):
    """The first run's score less the second's, and the two-sided p of no difference."""

    difference: Estimate
    p: float


def paired(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"]) -> Paired:
    """Two runs' scores by prompt: their mean difference, tested by exchanging the runs prompt by prompt.

    Its rate of false alarms is exact at every size (Fisher 1935). NaN where a score is.
    Raises ValueError for unequal counts.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    _check_equal(a, b)
    with np.errstate(invalid="ignore"):  # of two infinite scores, as PSNR's of equal images
        differences = a - b
    return _sign_flips(differences)


def paired_sets(expand: Callable[[Features], Expansion], a: Features, b: Reference) -> Paired:
    """Two runs' score of a set, such as `lambda x: expand_frechet(x, reference)`, tested in the same way.

    Rows of `a` and `b` belong to the same prompts. To exchange runs moves both sets about their union, opposite ways:
    even orders of the score cancel, and to third order the difference, bias taken off, is the mean of the differences
    between the samples' influences on the union's score. So one expansion serves all exchanges, and the test stays
    exact. The reference counts as given. Raises ValueError for unequal counts, and as `expand` does.
    """
    _check_equal(a, b)
    of_a, of_b = np.split(expand(np.concatenate([a, b])).influences[0], 2)
    return _sign_flips(of_a - of_b)


def _check_equal(a: np.ndarray, b: np.ndarray) -> None:
    if len(a) != len(b):
        raise ValueError(
            f"scores of {len(a)} and {len(b)} prompts; a paired test needs the same prompts for both runs"
        )


def _sign_flips(differences: Float[np.ndarray, " n"]) -> Paired:
    estimate = mean_estimate(differences)
    if not np.isfinite(estimate.value):
        return Paired(estimate, float("nan"))
    rng, total, shape = np.random.default_rng(0), differences.sum(), (BATCH, len(differences))
    exchanged = [
        rng.integers(0, 2, shape, dtype=np.int8) @ differences for _ in range(RESAMPLES // BATCH)
    ]
    # Sums of the same numbers in another order may differ in their last digits.
    as_large = np.abs(total - 2 * np.concatenate(exchanged)) >= abs(total) * (1 - 1e-9)
    return Paired(estimate, float((1 + as_large.sum()) / (1 + RESAMPLES)))
