"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991).

A set's manifold is the union of balls around its samples, each as wide as the distance to its k-th neighbour.
Precision is the share of generated samples in the reference's manifold; recall that of the reference's samples in the
manifold of the generated ones. Both depend on the sizes of the sets: compare equal sizes only.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from scipy import stats

from ldm_jax.metrics.expansion import Features, Reference, checked
from ldm_jax.metrics.kernel import blocks, squared_distances
from ldm_jax.types import Estimate


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: Estimate
    recall: Estimate


def precision_recall(features: Features, reference: Reference, *, k: int = 3) -> PrecisionRecall:
    """Both shares, with the interval of a share for manifolds taken as given (Wilson 1927).

    For precision that is the scatter of new samples against the same reference. Recall's manifold is drawn anew, too;
    its scatter is nearly the interval's where features have many dimensions, and wider where they have few.
    Raises ValueError for sets of k samples or fewer, and for features that are not finite.
    """
    x, y = checked(features), checked(reference)
    if min(len(x), len(y)) <= k:
        raise ValueError(
            f"sets of {len(x)} and {len(y)} samples; neighbour {k} needs {k + 1} of each"
        )
    return PrecisionRecall(_share(within(x, y, k=k)), _share(within(y, x, k=k)))


def within(points: Features, samples: Reference, *, k: int) -> Bool[np.ndarray, " n"]:
    """Which points lie in the manifold of the samples, its border included."""
    # A sample is its own nearest neighbour, at index 0.
    near = [
        np.partition(squared_distances(block, samples), k, axis=1)[:, k]
        for block in blocks(samples, samples)
    ]
    radii = np.concatenate(near)[None]
    inside = [
        np.any(squared_distances(block, samples) <= radii, axis=1)
        for block in blocks(points, samples)
    ]
    return np.concatenate(inside)


def _share(inside: Bool[np.ndarray, " n"]) -> Estimate:
    count = len(inside)
    test = stats.binomtest(int(inside.sum()), count)
    low, high = test.proportion_ci(0.95, method="wilson")
    return Estimate(float(inside.mean()), float(low), float(high), count)
