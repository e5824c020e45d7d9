"""The Fréchet distance between two sets of features, taken as Gaussians (Heusel et al. 2017, arXiv:1706.08500).

The distance of two finite sets is not that of their populations: it is larger, by about a constant over the number of
samples (Chong & Forsyth 2020, arXiv:1911.07023), and it scatters. Both follow from the expansion of the distance to
second order in the samples (von Mises 1947): the first order is a sum over samples, whose variance is measured, and
the mean of the second order is the bias. One decomposition gives both; nothing is resampled.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import linalg

from ldm_jax.metrics.expansion import Expansion, Features, Reference, checked
from ldm_jax.types import Estimate


class Moments(NamedTuple):
    """What the distance needs of a set: the mean, the covariance (over count - 1), the number of samples."""

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]
    count: int


def moments(features: Features) -> Moments:
    """The moments of a set of more samples than features have dimensions.

    Raises ValueError for fewer, whose covariance is singular, and for features that are not finite.
    """
    features = checked(features)
    count, width = features.shape
    if count <= width:
        raise ValueError(
            f"{count} samples of {width} dimensions; the Fréchet distance needs "
            f"{width + 1}, and KID serves fewer"
        )
    return Moments(features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)), count)


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared distance that papers print (Dowson & Landau 1982, eq. 16), biased upward.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), by the eigenvalues of the symmetric product.
    """
    _check_widths(a, b)
    root = _root(b.covariance)
    spectrum = linalg.eigvalsh(root @ a.covariance @ root)
    return _distance(a, b, np.sqrt(np.maximum(spectrum, 0)))


def frechet(features: Features, reference: Reference | Moments) -> Estimate:
    """The squared distance of the populations, without the bias of the plug-in value, and with its interval.

    What the expansion leaves, of order 1 / n^2, goes by extrapolation from the two halves of the sets. Equal
    populations may have a value below 0. A reference given as `Moments` counts as exact: the value is then the
    distance to that set itself. The interval holds its rate from about 10 samples a dimension, and from 5 where the
    tails of the features are short. Raises ValueError for fewer than two samples a dimension and two more, for
    features that are not finite, and where the two sets have other dimensions.
    """
    halves = [
        expand_frechet(*pair).value
        for pair in zip(_halves(features), _halves(reference), strict=True)
    ]
    expansion = expand_frechet(features, reference)
    more = (float(np.mean(halves)) - expansion.value) / 3
    return expansion._replace(value=expansion.value - more, bias=expansion.bias + more).squared()


def plug_in_frechet(features: Features, reference: Reference) -> Estimate:
    """The squared distance that papers print, with the bias of its sets, and the interval of `frechet` shifted by that.

    It has an interval where `frechet` has one. Raises ValueError as `moments` does.
    """
    value = frechet_distance(moments(features), moments(reference))
    if min(len(features), len(reference)) < 2 * features.shape[1] + 2:
        return Estimate(value, float("nan"), float("nan"), len(features))
    without = frechet(features, reference)
    shift = value - without.value
    return Estimate(value, without.low + shift, without.high + shift, without.count)


def expand_frechet(features: Features, reference: Reference | Moments) -> Expansion:
    """The squared distance to second order in the features, and in those of the reference where these are given.

    With M = R^(1/2) S R^(1/2) = U L U' and T = R^(1/2) M^(-1/2) R^(1/2), the optimal map of N(mu, S) to N(m, R), the
    influence of x is 2 (mu - m)'(x - mu) + (x - mu)'(I - T)(x - mu) less its mean. The second order is the square of
    the mean's error plus half the sum over i, j of E_ij^2 / (l_i l_j (l_i + l_j)), with l = L^(1/2) and E the error of
    M in the basis U.
    """
    a = moments(features)
    b = reference if isinstance(reference, Moments) else moments(reference)
    _check_widths(a, b)
    root = _root(b.covariance)
    spectrum, basis = linalg.eigh(root @ a.covariance @ root)
    # Dimensions that one of the sets does not fill tell nothing, and would divide zero by zero.
    filled = spectrum > len(spectrum) * np.finfo(float).eps * spectrum[-1]
    roots, basis = np.sqrt(spectrum[filled]), root @ basis[:, filled]
    sides = [_side(features, a, a.mean - b.mean, basis, roots)]
    if not isinstance(reference, Moments):
        back = a.covariance @ basis / roots
        sides.append(_side(reference, b, b.mean - a.mean, back, roots))
    mean_error = sum(side.mean_error for side in sides)
    errors = _weights(roots) * sum(side.errors for side in sides)
    second = 2 * np.sum(mean_error**2) + np.sum(errors**2) - np.sum(np.diag(errors) ** 2) / 2
    bias = float(sum(side.bias for side in sides))
    influences = tuple(side.influence for side in sides)
    return Expansion(_distance(a, b, roots) - bias, bias, influences, float(second))


def _check_widths(a: Moments, b: Moments) -> None:
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"features of {len(a.mean)} and {len(b.mean)} dimensions; are they of one network?"
        )


def _halves(given: Features | Moments) -> tuple[Any, Any]:
    if isinstance(given, Moments):
        return given, given
    given = checked(given)
    count, width = given.shape
    if count < 2 * width + 2:
        raise ValueError(
            f"{count} samples of {width} dimensions; an interval of the Fréchet distance needs "
            f"{2 * width + 2}, the distance alone {width + 1}, and KID serves fewer"
        )
    first, second = np.array_split(np.random.default_rng(0).permutation(count), 2)
    return given[first], given[second]


class _Side(NamedTuple):
    """What the scatter of one set does: to the score by sample and on average, to the mean, to M."""

    influence: Float[np.ndarray, " n"]
    bias: float
    mean_error: Float[np.ndarray, "D D"]
    errors: Float[np.ndarray, "L L"]


def _side(
    features: Features,
    own: Moments,
    shift: Float[np.ndarray, " D"],
    basis: Float[np.ndarray, "D L"],
    roots: Float[np.ndarray, " L"],
) -> _Side:
    centred = np.asarray(features, np.float64) - own.mean
    lengths, squares = np.sum(centred**2, axis=1), (centred @ basis) ** 2
    moved = squares @ (1 / roots)
    first = 2 * centred @ shift + lengths - moved
    # The second order of a sample with itself: a bias, which no other sample shares.
    alone = lengths + (np.sum(squares @ _weights(roots) * squares, axis=1) - moved) / 2
    alone = (alone + roots.sum() / 4) / own.count
    influence = first - 2 * alone
    products = (squares.T @ squares / own.count - np.diag(roots**4)) / own.count
    return _Side(influence - influence.mean(), alone.mean(), own.covariance / own.count, products)


def _weights(roots: Float[np.ndarray, " L"]) -> Float[np.ndarray, "L L"]:
    return 1 / (np.outer(roots, roots) * np.add.outer(roots, roots))


def _root(covariance: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D D"]:
    values, vectors = linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _distance(a: Moments, b: Moments, roots: Float[np.ndarray, " L"]) -> float:
    squared = np.sum((a.mean - b.mean) ** 2)
    spread = np.trace(a.covariance) + np.trace(b.covariance)
    return float(squared + spread - 2 * roots.sum())
