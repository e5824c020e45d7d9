"""Distances of sets by kernels: the squared maximum mean discrepancy (Gretton et al. 2012).

KID (Bińkowski et al. 2018, arXiv:1801.01401) and CMMD (Jayasumana et al. 2024, arXiv:2401.09603). The unbiased
estimate is a U-statistic of all samples; its variance follows from the same kernel values (Sutherland et al. 2017,
arXiv:1611.04488). Kernel matrices are made and summed in blocks, and never held whole.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ldm_jax.metrics.expansion import Expansion, Features, Reference, checked
from ldm_jax.types import Estimate

Kernel = Callable[[Features, Reference], Float[np.ndarray, "n m"]]

BLOCK = 2**24  # kernel values at a time: 128 MiB
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


def polynomial(x: Features, y: Reference) -> Float[np.ndarray, "n m"]:
    """KID's kernel, (x'y / D + 1)^3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Features, y: Reference) -> Float[np.ndarray, "n m"]:
    """CMMD's kernel, 1000 exp(-|x - y|^2 / (2 sigma^2)) with sigma 10, for features of unit norm."""
    return CMMD_SCALE * np.exp(-squared_distances(x, y) / (2 * CMMD_SIGMA**2))


def squared_distances(x: Features, y: Reference) -> Float[np.ndarray, "n m"]:
    """|x - y|^2 by one matrix product; equal vectors may be off zero by rounding."""
    return np.sum(x**2, axis=1)[:, None] + np.sum(y**2, axis=1)[None, :] - 2 * x @ y.T


def blocks(x: Features, y: Reference) -> list[Float[np.ndarray, "_ D"]]:
    """The rows of `x` in parts whose pairs with all of `y` fit in memory."""
    return np.array_split(x, -(-len(x) * len(y) // BLOCK))


def kid(features: Features, reference: Reference) -> Estimate:
    """The kernel inception distance of all samples: unbiased, and so below 0 at times where populations agree.

    Raises ValueError for fewer than two samples and for features that are not finite.
    """
    return expand_mmd(features, reference, polynomial).squared()


def cmmd(features: Features, reference: Reference) -> Estimate:
    """CMMD of CLIP's unit features, times 1000, by the unbiased estimator.

    `biased_cmmd` is the value that papers print. Raises ValueError as `kid` does.
    """
    return expand_mmd(features, reference, gaussian).squared()


def biased_cmmd(features: Features, reference: Reference) -> float:
    """CMMD as its authors print it: a mean over all pairs, those of a sample with itself too."""
    x, y = checked(features), checked(reference)
    xx, yy, xy = (_sums(*pair, gaussian).rows.mean() for pair in ((x, x), (y, y), (x, y)))
    return float(xx / len(x) + yy / len(y) - 2 * xy / len(y))


def kid_of_subsets(
    features: Features,
    reference: Reference,
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Mean and deviation of KID over random subsets, drawn as torch-fidelity does: the values that papers print.

    Subsets share samples, so their deviation is no error of the mean. Raises ValueError where a set is smaller than
    a subset.
    """
    x, y = checked(features), checked(reference)
    if size > min(len(x), len(y)):
        raise ValueError(f"subsets of {size} from sets of {len(x)} and {len(y)} samples")
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        draws = [each[rng.choice(len(each), size, replace=False)] for each in (x, y)]
        values.append(expand_mmd(*draws, polynomial).value)
    return float(np.mean(values)), float(np.std(values))


def expand_mmd(features: Features, reference: Reference, kernel: Kernel) -> Expansion:
    """The unbiased squared discrepancy (Gretton et al. 2012, eq. 3) to second order in both sets."""
    x, y = checked(features), checked(reference)
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"sets of {n} and {m} samples; a kernel distance needs two of each")
    xx, yy, xy = _pairs(x, kernel), _pairs(y, kernel), _sums(x, y, kernel)
    near_x, near_y = xx.rows / (n - 1), yy.rows / (m - 1)
    to_y, to_x = xy.rows / m, xy.columns / n
    value = near_x.mean() + near_y.mean() - 2 * to_y.mean()
    influences = tuple(2 * (each - each.mean()) for each in (near_x - to_y, near_y - to_x))
    second = (
        2 * _interaction(xx, n - 1, n - 1) / (n * (n - 1))
        + 2 * _interaction(yy, m - 1, m - 1) / (m * (m - 1))
        + 4 * _interaction(xy, m, n) / (n * m)
    )
    bias = _excess(xx) + _excess(yy)
    return Expansion(float(value), float(bias), influences, float(second))


class _Sums(NamedTuple):
    """Of a kernel matrix: sums of its rows and of its columns, the sum of its squares, the diagonal if left out."""

    rows: Float[np.ndarray, " n"]
    columns: Float[np.ndarray, " m"]
    squares: float
    diagonal: Float[np.ndarray, " n"] | None = None


def _sums(x: Features, y: Reference, kernel: Kernel) -> _Sums:
    rows, columns, squares = [], np.zeros(len(y)), 0.0
    for block in blocks(x, y):
        values = kernel(block, y)
        rows.append(values.sum(axis=1))
        columns += values.sum(axis=0)
        squares += np.vdot(values, values)
    return _Sums(np.concatenate(rows), columns, squares)


def _pairs(x: Features, kernel: Kernel) -> _Sums:
    """Without the diagonal."""
    sums = _sums(x, x, kernel)
    small = np.array_split(x, -(-len(x) // 64))
    alone = np.concatenate([np.diagonal(kernel(block, block)) for block in small])
    rows = sums.rows - alone
    return _Sums(rows, rows, sums.squares - np.vdot(alone, alone), alone)


def _excess(pairs: _Sums) -> float:
    """What the diagonal would add to the mean over all pairs."""
    count = len(pairs.rows)
    return (pairs.diagonal.mean() - pairs.rows.mean() / (count - 1)) / count


def _interaction(sums: _Sums, across: int, down: int) -> float:
    """The mean square of the kernel centred in both arguments; rows hold `across` values, columns `down`."""
    rows, columns = sums.rows / across, sums.columns / down
    square = sums.squares / (len(rows) * across)
    return max(square - np.mean(rows**2) - np.mean(columns**2) + rows.mean() ** 2, 0.0)
