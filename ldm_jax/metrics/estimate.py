"""Scores with intervals of 95% over prompts: of means, of shares, and of their differences between two groups."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from ldm_jax.metrics.expansion import NORMAL
from ldm_jax.types import Estimate

RESAMPLES = 2000

Values = Float[np.ndarray, " n"]
Others = Float[np.ndarray, " m"]


def mean_estimate(values: Values, less: Others | None = None) -> Estimate:
    """The mean of independent per-prompt scores, less that of others, by the percentile bootstrap (Efron 1979).

    A single value has no interval: it is NaN. Where a value is NaN or infinite, so is the mean, without an interval.
    Raises ValueError without values.
    """
    samples = [np.asarray(each, np.float64) for each in (values, less) if each is not None]
    _check_some(*samples)
    value, count = float(_difference(*samples)), sum(map(len, samples))
    if min(map(len, samples)) == 1 or not np.isfinite(value):
        return Estimate(value, float("nan"), float("nan"), count)
    if all(np.ptp(sample) == 0 for sample in samples):  # scipy warns of what is certain
        return Estimate(value, value, value, count)
    low, high = stats.bootstrap(
        samples, _difference, n_resamples=RESAMPLES, method="percentile", rng=0, batch=100
    ).confidence_interval
    return Estimate(value, float(low), float(high), count)


def share_estimate(
    hits: Values | Bool[np.ndarray, " n"],
    less: Others | Bool[np.ndarray, " m"] | None = None,
    *,
    shared: float = 0.0,
) -> Estimate:
    """The share of ones among zeros and ones with Wilson's interval (1927), less that of others with Newcombe's.

    Wilson's holds its rate on average over shares, and covers 91.6% or more where a one and a zero or more are to be
    expected; the bootstrap covers 47% for a share of 0.99 of 64. The difference's is method 10 of Newcombe 1998
    ("Interval estimation for the difference between independent proportions").

    `shared` is what the share's variance has beyond that of independent draws: the interval is that of as many fewer
    draws. Where a value is NaN, so is the share, without an interval.
    Raises ValueError without values, and for values that are neither 0 nor 1.
    """
    hits = np.asarray(hits, np.float64)
    _check_shares(hits)
    if less is not None:
        return _newcombe(share_estimate(hits, shared=shared), share_estimate(less))
    share, count = float(hits.mean()), len(hits)
    variance = share * (1 - share) / count
    draws = count * variance / (variance + shared) if variance else count
    middle, scale = (share + NORMAL**2 / (2 * draws)), 1 + NORMAL**2 / draws
    half = NORMAL * np.sqrt(share * (1 - share) / draws + (NORMAL / (2 * draws)) ** 2)
    low, high = np.clip([(middle - half) / scale, (middle + half) / scale], 0, 1)
    return Estimate(share, float(low), float(high), count)


def by_group(
    name: str,
    values: Float[np.ndarray, "*seeds n"],
    groups: Sequence[str],
    *,
    estimate: Callable[..., Estimate] = mean_estimate,
) -> dict[str, Estimate]:
    """`name`: the mean over all prompts; `name/GROUP` of each named group; with two groups `name/gap`.

    The gap is the first group's mean less the second's. `estimate` takes the values of all prompts, of a group, and of
    two groups: `mean_estimate`, `share_estimate`, or of `[S, n]` `seeds.over_prompts_and_seeds`.
    """
    scores = {name: estimate(values)}
    names = [group for group in dict.fromkeys(groups) if group]
    parts = [values[..., np.array(groups) == group] for group in names]
    scores |= {f"{name}/{group}": estimate(part) for group, part in zip(names, parts, strict=True)}
    if len(parts) == 2:
        scores[f"{name}/gap"] = estimate(*parts)
    return scores


def _difference(
    a: np.ndarray, b: np.ndarray | None = None, *, axis: int = -1
) -> np.ndarray | np.floating:
    return a.mean(axis) if b is None else a.mean(axis) - b.mean(axis)


def _newcombe(a: Estimate, b: Estimate) -> Estimate:
    value = a.value - b.value
    low = value - np.hypot(a.value - a.low, b.high - b.value)
    high = value + np.hypot(a.high - a.value, b.value - b.low)
    return Estimate(value, float(low), float(high), a.count + b.count)


def _check_some(*samples: np.ndarray) -> None:
    if not all(map(len, samples)):
        raise ValueError("a score needs at least one prompt that can be scored, and there is none")


def _check_shares(hits: Values) -> None:
    _check_some(hits)
    other = hits[~np.isnan(hits) & (hits != 0) & (hits != 1)]
    if len(other):
        raise ValueError(f"a share is of zeros and ones, and a value is {other[0]}")
