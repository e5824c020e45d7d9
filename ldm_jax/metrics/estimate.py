"""Scores with intervals: 95%, percentile bootstrap over prompts (Efron 1979)."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from ldm_jax.types import Estimate

RESAMPLES = 2000


def mean_estimate(values: Float[np.ndarray, " n"]) -> Estimate:
    """The mean of independent per-prompt scores with its interval.

    A single value has no interval: it is NaN. Where a value is NaN or infinite, so is the mean, without an interval.
    Raises ValueError without values.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("a score needs at least one prompt that can be scored, and there is none")
    return _bootstrap((values,), np.mean)


def by_group(
    name: str, values: Float[np.ndarray, " n"], groups: Sequence[str]
) -> dict[str, Estimate]:
    """`name`: the mean over all prompts; `name/GROUP` of each named group; with two groups `name/gap`.

    The gap is the first group's mean less the second's.
    """
    scores = {name: mean_estimate(values)}
    names = [group for group in dict.fromkeys(groups) if group]
    parts = [values[np.array(groups) == group] for group in names]
    scores |= {
        f"{name}/{group}": mean_estimate(part) for group, part in zip(names, parts, strict=True)
    }
    if len(parts) == 2:
        scores[f"{name}/gap"] = _bootstrap(parts, lambda a, b, axis: a.mean(axis) - b.mean(axis))
    return scores


def _bootstrap(
    samples: Sequence[Float[np.ndarray, " _"]], statistic: Callable[..., np.ndarray]
) -> Estimate:
    value, count = float(statistic(*samples, axis=0)), sum(map(len, samples))
    if min(map(len, samples)) == 1 or not np.isfinite(value):
        return Estimate(value, float("nan"), float("nan"), count)
    if all(np.ptp(sample) == 0 for sample in samples):  # scipy warns of what is certain
        return Estimate(value, value, value, count)
    low, high = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, method="percentile", rng=0, batch=100
    ).confidence_interval
    return Estimate(value, float(low), float(high), count)
