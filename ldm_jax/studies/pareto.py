"""What is best at each cost: the Pareto frontier, and who owns which stretch of it. A larger score is better."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Costs = Float[np.ndarray, " points"]
Scores = Float[np.ndarray, "*samples points"]


class Stretch(NamedTuple):
    """Costs over which the best that can be had belongs to one owner.

    Attributes:
      low, high: from the cost of the first point that it owns to where the next owner begins (inf at the end).
      owner: its number.
      share: of the resamples that agree, the least over the stretch; NaN without resamples.
    """

    low: float
    high: float
    owner: int
    share: float


def frontier(cost: Costs, score: Float[np.ndarray, " points"]) -> Int[np.ndarray, " best"]:
    """The points, by rising cost, that nothing as cheap or cheaper equals or beats. NaN scores are on no frontier."""
    best, found = -np.inf, []
    for point in np.lexsort((-score, cost)):
        if score[point] > best:
            best = score[point]
            found.append(point)
    return np.array(found, int)


def best_within(
    cost: Costs, scores: Scores, budgets: Float[np.ndarray, " budgets"]
) -> Int[np.ndarray, "*samples budgets"]:
    """The point with the best score of those that each budget pays for.

    Raises ValueError for a budget that pays for none.
    """
    if np.min(budgets) < np.min(cost):
        raise ValueError(
            f"a budget of {np.min(budgets):g} pays for nothing: the cheapest costs {np.min(cost):g}"
        )
    affordable = cost <= budgets[:, None] * (1 + 1e-9)
    known = np.where(np.isnan(scores), -np.inf, scores)[..., None, :]
    return np.argmax(np.where(affordable, known, -np.inf), axis=-1)


def stretches(cost: Costs, scores: Scores, owners: Int[np.ndarray, " points"]) -> list[Stretch]:
    """Who has the best that can be had, from the cheapest point on: by row 0 of the scores, with which others agree."""
    budgets = np.unique(cost)
    of_all = owners[best_within(cost, np.atleast_2d(scores), budgets)]
    agree = (
        np.mean(of_all[1:] == of_all[0], axis=0)
        if len(of_all) > 1
        else np.full(len(budgets), np.nan)
    )
    begins = np.flatnonzero(np.diff(of_all[0], prepend=-1))
    ends = [*begins[1:], len(budgets)]
    highs = [*budgets[begins[1:]], np.inf]
    return [
        Stretch(float(budgets[i]), float(high), int(of_all[0, i]), float(np.min(agree[i:j])))
        for i, j, high in zip(begins, ends, highs, strict=True)
    ]
