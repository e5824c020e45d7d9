"""Fits of scaling: power laws with and without a floor, the loss in parameters and examples, and budgets' best sizes.

Every curve here is a sum of powers, so its logarithm is a log-sum-exp of terms that are linear in what is fitted: one
solver fits them all, by Huber's loss of logarithms (Hoffmann et al. 2022, approach 3; done with care by Besiroglu et
al. 2024, arXiv:2404.10102), whose threshold is theirs or, where noise is larger, Huber's own of 1.345 of its standard
deviations. It starts where variable projection ends: at those exponents of a grid whose coefficients, by non-negative
least squares, leave the least (arXiv:2603.22339).

Intervals of 95% are by resampling residuals, each divided by what its leverage takes from it and all multiplied by the
root of (n - p) / chi-squared, since n points less p parameters know their noise no better. They hold for other runs at
the same points whose noise is independent; what points share (prompts, noise) is added by resamples of the scores.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import optimize, special

from ldm_jax.types import Estimate

RESAMPLES = 1000
HUBER = 1e-3  # of a logarithm (Hoffmann et al. 2022): a residual beyond it counts by its size and not its square
TUNED = 1.345  # standard deviations beyond which it does so with 95% of the efficiency of least squares (Huber 1964)
EXPONENTS = tuple(np.linspace(0.125, 2, 16))  # from which a fit starts
STEPS = 100  # of the solver at most
SMALL = 1e-8  # a step at which it ends

Points = Float[np.ndarray, " points"]
Scores = Float[np.ndarray, "..."]  # of points, or a row of them for each resample
Draws = Float[np.ndarray, "draws parameters"]
Terms = Float[np.ndarray, "terms points parameters"]


class Powers(NamedTuple):
    """A sum of powers, one of each variable, and a floor: what a fit found.

    Attributes:
      names: of the variables, for errors.
      variables: the points that it was fitted to.
      draws: [log coefficient, exponent] of each variable, then log floor if there is one; row 0 of the points, each
        further one of a resample.
    """

    names: tuple[str, ...]
    variables: tuple[Points, ...]
    draws: Draws

    @property
    def has_floor(self) -> bool:
        """Whether a floor was fitted."""
        return self.draws.shape[1] % 2 == 1

    def at(self, *values: float, reach: float = 1.0) -> Estimate:
        """The curve at one value of each variable, with its interval.

        Raises ValueError for a value more than `reach` times beyond the points.
        """
        for name, points, value in zip(self.names, self.variables, values, strict=True):
            _within(name, points, value, reach)
        terms = _terms([np.array([value]) for value in values], floor=self.has_floor)
        return self.estimate(np.exp(_curve(terms, self.draws)[:, 0]))

    def estimate(self, draws: Float[np.ndarray, " draws"]) -> Estimate:
        """A value with the interval of its resamples."""
        low, high = np.percentile(draws[1:], [2.5, 97.5])
        return Estimate(float(draws[0]), float(low), float(high), len(self.variables[0]))


class PowerLaw(NamedTuple):
    """y = floor + scale x^exponent; the floor is None where none was fitted."""

    scale: Estimate
    exponent: Estimate
    floor: Estimate | None
    curve: Powers


class Parametric(NamedTuple):
    """loss = E + A / params^alpha + B / examples^beta (Hoffmann et al. 2022, equation 2)."""

    E: Estimate
    A: Estimate
    alpha: Estimate
    B: Estimate
    beta: Estimate
    curve: Powers

    @property
    def exponent(self) -> Estimate:
        """How the best number of parameters grows with compute where that is their product with the examples."""
        alpha, beta = -self.curve.draws[:, 1], -self.curve.draws[:, 3]
        return self.curve.estimate(beta / (alpha + beta))

    def best(self, product: float, *, reach: float = 1.0) -> tuple[Estimate, Estimate]:
        """The parameters and the examples with the least loss, whose product is given.

        It is a budget's FLOPs over those of one parameter and one example.
        Raises ValueError for either more than `reach` times beyond the points.
        """
        a, alpha, b, beta, _ = self.curve.draws.T
        # The derivative of A N^alpha + B (product / N)^beta is zero there; both exponents are negative.
        log = (a + np.log(-alpha) - b - np.log(-beta) - beta * math.log(product)) / -(alpha + beta)
        found = np.exp(log), product / np.exp(log)
        for name, points, draws in zip(self.curve.names, self.curve.variables, found, strict=True):
            _within(name, points, float(draws[0]), reach)
        params, examples = map(self.curve.estimate, found)
        return params, examples


def fit_power_law(
    x: Points,
    y: Scores,
    *,
    floor: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PowerLaw:
    """Fits a power law.

    `y` is what was measured; of a matrix row 0 is, and each further row is a resample of what the points share.
    Raises ValueError for values that are not finite and above zero, and where there are not more points than
    parameters.
    """
    starts = itertools.product([sign * each for sign in (-1, 1) for each in EXPONENTS])
    curve = _fit({"x": x}, y, starts, floor, resamples, seed)
    scale, exponent = curve.estimate(np.exp(curve.draws[:, 0])), curve.estimate(curve.draws[:, 1])
    return PowerLaw(
        scale, exponent, curve.estimate(np.exp(curve.draws[:, 2])) if floor else None, curve
    )


def fit_loss(
    params: Points,
    examples: Points,
    loss: Scores,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Parametric:
    """Fits the loss as a function of parameters and of examples seen; `loss` and errors as in `fit_power_law`."""
    starts = itertools.product([-each for each in EXPONENTS], repeat=2)
    curve = _fit({"params": params, "examples": examples}, loss, starts, True, resamples, seed)
    a, alpha, b, beta, e = curve.draws.T
    return Parametric(
        *(curve.estimate(draws) for draws in (np.exp(e), np.exp(a), -alpha, np.exp(b), -beta)),
        curve,
    )


def best_size(sizes: Points, values: Points) -> tuple[float, float]:
    """The size with the least value at one budget, and that value, by a parabola in the logarithm of the size.

    It is biased where sizes lie unevenly about the minimum (arXiv:2603.22339).
    Raises ValueError for fewer than three sizes, and where the least is not enclosed by them.
    """
    if len(set(sizes)) < 3:
        raise ValueError(f"a parabola takes three sizes or more, and there are {len(set(sizes))}")
    square, slope, level = np.polyfit(np.log(sizes), values, 2)
    log = -slope / (2 * square) if square > 0 else math.inf
    if not math.log(min(sizes)) <= log <= math.log(max(sizes)):
        raise ValueError(
            f"the best size is not among those from {min(sizes):g} to {max(sizes):g}: try smaller and larger ones"
        )
    return math.exp(log), float(level - slope**2 / (4 * square))


def _fit(
    variables: dict[str, Points],
    y: Scores,
    starts: Iterable[Sequence[float]],
    floor: bool,
    resamples: int,
    seed: int,
) -> Powers:
    names, points = tuple(variables), tuple(variables.values())
    y = np.atleast_2d(y)
    _check({**variables, "y": y}, 2 * len(points) + floor)
    # Powers of what is one in the middle: terms that are then of a size.
    middles = [np.exp(np.mean(np.log(each))) for each in points]
    centred = [each / middle for each, middle in zip(points, middles, strict=True)]
    _, start = min(
        (_projected(centred, y[0], exponents, floor) for exponents in starts), key=lambda x: x[0]
    )
    terms = _terms(centred, floor=floor)
    rough = _solved(terms, np.log(y[:1]), start[None], HUBER)
    huber = max(HUBER, TUNED * _noise(np.log(y[0]) - _curve(terms, rough)[0], len(start)))
    first = _solved(terms, np.log(y[:1]), rough, huber)
    targets = _resampled(terms, np.log(y), first, resamples, np.random.default_rng(seed))
    others = _solved(terms, targets, np.repeat(first, resamples, axis=0), huber)
    draws = np.concatenate([first, others])
    for number, middle in enumerate(middles):
        draws[:, 2 * number] -= draws[:, 2 * number + 1] * np.log(middle)
    return Powers(names, points, draws)


def _check(given: dict[str, np.ndarray], parameters: int) -> None:
    for name, values in given.items():
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError(f"{name} must be finite and above zero everywhere; powers are of such")
    counts = {name: values.shape[-1] for name, values in given.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{counts} are not as many points of each")
    if counts["y"] <= parameters:
        raise ValueError(
            f"a fit of {parameters} parameters takes {parameters + 1} points or more, and there are {counts['y']}"
        )


def _within(name: str, points: Points, value: float, reach: float) -> None:
    low, high = float(np.min(points)), float(np.max(points))
    beyond = max(low / value, value / high)
    if beyond > reach:
        raise ValueError(
            f"{name} = {value:g} is {beyond:.3g} times beyond the points, which go from {low:g} to {high:g}; reach ="
            f" {beyond:.3g} extrapolates"
        )


def _terms(variables: Sequence[Points], *, floor: bool) -> Terms:
    """What the parameters are multiplied by in each term's logarithm."""
    count = len(variables)
    terms = np.zeros((count + floor, len(variables[0]), 2 * count + floor))
    for number, points in enumerate(variables):
        terms[number, :, 2 * number] = 1
        terms[number, :, 2 * number + 1] = np.log(points)
    if floor:
        terms[-1, :, -1] = 1
    return terms


def _projected(
    variables: Sequence[Points], y: Points, exponents: Sequence[float], floor: bool
) -> tuple[float, Float[np.ndarray, " parameters"]]:
    """What the best coefficients of these exponents leave, relative to the points; and both as parameters."""
    columns = [x**exponent for x, exponent in zip(variables, exponents, strict=True)]
    columns += [np.ones_like(y)] * floor
    coefficients, left = optimize.nnls(np.stack(columns, 1) / y[:, None], np.ones_like(y))
    logs = np.log(np.maximum(coefficients, 1e-6 * y.min()))
    parameters = np.empty(2 * len(exponents) + floor)
    parameters[0 : 2 * len(exponents) : 2] = logs[: len(exponents)]
    parameters[1 : 2 * len(exponents) : 2] = exponents
    parameters[2 * len(exponents) :] = logs[len(exponents) :]
    return float(left), parameters


def _curve(terms: Terms, parameters: Draws) -> Float[np.ndarray, "draws points"]:
    """Its logarithm."""
    return special.logsumexp(np.einsum("tnp,dp->dtn", terms, parameters), axis=1)


def _slopes(terms: Terms, parameters: Draws) -> Float[np.ndarray, "draws points parameters"]:
    """The derivatives of the curve's logarithm."""
    shares = special.softmax(np.einsum("tnp,dp->dtn", terms, parameters), axis=1)
    return np.einsum("dtn,tnp->dnp", shares, terms)


def _noise(residuals: Points, parameters: int) -> float:
    """Their standard deviation, by the median of their sizes: a few wild ones do not count."""
    freedom = len(residuals) - parameters
    return float(np.median(np.abs(residuals)) / 0.6745 * math.sqrt(len(residuals) / freedom))


def _solved(
    terms: Terms, targets: Float[np.ndarray, "draws points"], start: Draws, huber: float
) -> Draws:
    """The parameters of least loss, of all draws at once, by Levenberg's and Marquardt's steps."""
    parameters, damping = start.copy(), np.full(len(start), 1e-3)
    losses = lambda given: special.huber(huber, targets - _curve(terms, given)).sum(axis=1)  # noqa: E731
    loss = losses(parameters)
    for _ in range(STEPS):
        residuals, slopes = targets - _curve(terms, parameters), _slopes(terms, parameters)
        weights = huber / np.maximum(np.abs(residuals), huber)
        weighted = np.swapaxes(slopes * weights[..., None], 1, 2)
        normal = weighted @ slopes
        diagonal = np.einsum("dpp->dp", normal)
        diagonal += damping[:, None] * diagonal + 1e-15
        step = np.linalg.solve(normal, (weighted @ residuals[..., None]))[..., 0]
        tried = losses(parameters + step)
        better = tried <= loss
        parameters[better] += step[better]
        loss = np.where(better, tried, loss)
        damping = np.where(better, damping / 5, damping * 5).clip(1e-12, 1e12)
        if np.abs(step).max() < SMALL:
            break
    return parameters


def _resampled(
    terms: Terms,
    logs: Float[np.ndarray, "samples points"],
    fitted: Draws,
    resamples: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "resamples points"]:
    """Points of other runs: the curve, residuals drawn anew, and what a resample of the scores moves them by."""
    curve, slopes = _curve(terms, fitted)[0], _slopes(terms, fitted)[0]
    count, parameters = slopes.shape
    leverage = np.einsum("np,pn->n", slopes, np.linalg.pinv(slopes))
    residuals = (logs[0] - curve) / np.sqrt(1 - leverage.clip(max=0.95))
    freedom = count - parameters
    drawn = rng.choice(residuals - residuals.mean(), (resamples, count))
    drawn *= np.sqrt(freedom / rng.chisquare(freedom, (resamples, 1)))
    moved = logs[rng.integers(1, len(logs), resamples)] - logs[0] if len(logs) > 1 else 0
    return curve + drawn + moved
