"""Sampling efficiency: score against the cost of sampling, of trained models, samplers, steps and scales of guidance.

The questions are those of "Bigger is not Always Better" (arXiv:2404.01367): the best scale of guidance (section 4.3),
score against cost (4.2), the same for every sampler (4.4). All intervals are from one bootstrap over prompts,
the seeds of a prompt together: every resample chooses its scales of guidance and its best models anew. They hold for
other prompts and other noise, not for models trained again.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ldm_jax.studies.records import SamplingRecord
from ldm_jax.studies.verdicts import Verdict, above
from ldm_jax.types import Estimate

RESAMPLES = 2000
# Steps of the larger model up to which smaller ones are said to win (the paper's section 5).
FEW = 20
ROUNDING = 1e-9  # by which equal costs may differ
TIE = 1e-9  # a difference that rounding may make

Group = tuple[str, str, str]


class Point(NamedTuple):
    """A model at a number of steps, by the number of the model in its curve."""

    model: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Curve:
    """What one sampler makes of models at numbers of steps, each at the scale of guidance that is best for it.

    Row 0 of `scores` and `guidance` is of all prompts, each further one of a resample of them.
    """

    sampler: str
    models: tuple[str, ...]  # the smallest first
    points: tuple[Point, ...]
    cost: Float[np.ndarray, " points"]  # evaluations of the network times its relative cost
    flops: Float[np.ndarray, " points"]  # for an image, guidance counted
    seconds: Float[np.ndarray, " points"]  # for an image; NaN where not measured
    scores: Float[np.ndarray, "resamples points"]  # a larger one is better
    guidance: Float[np.ndarray, "resamples points"]

    @property
    def owners(self) -> Int[np.ndarray, " points"]:
        """The models of the points."""
        return np.array([point.model for point in self.points])

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of steps that occur."""
        return tuple(sorted({point.steps for point in self.points}))

    def estimates(self) -> list[Estimate]:
        """The scores of the points with their intervals."""
        return [interval(of_point) for of_point in self.scores.T]


class Pair(NamedTuple):
    """A point of a larger model against a smaller one at the same cost.

    The score of the smaller one is interpolated, in the logarithm of cost, between the two of its points whose costs
    enclose that cost; nothing is chosen by scores, as the best of several would win too often. `advantage` is that of
    the smaller one, row 0 of all prompts.
    """

    smaller: int
    larger: Point
    advantage: Float[np.ndarray, " resamples"]


class Finding(NamedTuple):
    """A verdict and what it is by: the share of pairs that the smaller model wins, row 0 of all prompts."""

    verdict: Verdict
    wins: Estimate
    resampled: Float[np.ndarray, " resamples"]


def groups(records: Iterable[SamplingRecord]) -> dict[Group, list[SamplingRecord]]:
    """Records by (study, grid, commit): those of different ones never stand in one figure. The newest is last."""
    found: dict[Group, list[SamplingRecord]] = {}
    for record in records:
        own = found.pop(record.group, [])
        own.append(record)
        found[record.group] = own
    return found


def curves(
    records: Sequence[SamplingRecord], score: str, *, lower_is_better: bool = False
) -> list[Curve]:
    """A curve a sampler, in the order of the records, of one group.

    A point that lacks scales of guidance or seeds that others of its sampler have is left out; so are prompts of which
    nothing is asked.

    Raises:
      ValueError: the records are of several groups, or have no such score by prompt.
    """
    if len(groups(records)) > 1:
        raise ValueError("these records are of several grids or commits, which are kept apart")
    for record in records:
        if score not in record.values:
            known = ", ".join(record.values)
            raise ValueError(f"the records have no score {score!r} by prompt; they have {known}")
    sign, order = -1.0 if lower_is_better else 1.0, models(records)
    by_sampler: dict[str, list[SamplingRecord]] = collections.defaultdict(list)
    for record in records:
        by_sampler[record.sampler].append(record)
    return [_curve(of_one, order, score, sign) for of_one in by_sampler.values()]


def models(records: Iterable[SamplingRecord]) -> tuple[str, ...]:
    """Their names, the smallest first."""
    ordered = sorted(records, key=lambda record: record.params)
    return tuple(dict.fromkeys(record.model for record in ordered))


def incomplete(records: Iterable[SamplingRecord]) -> list[str]:
    """The points that `curves` leaves out, as people read them."""
    by_sampler: dict[str, dict[tuple[str, int], int]] = collections.defaultdict(collections.Counter)
    for record in records:
        by_sampler[record.sampler][record.model, record.steps] += 1
    return [
        f"{model}, {sampler}, {steps} steps"
        for sampler, counts in by_sampler.items()
        for (model, steps), count in counts.items()
        if count < max(counts.values())
    ]


def _curve(
    records: Sequence[SamplingRecord], order: tuple[str, ...], score: str, sign: float
) -> Curve:
    at: dict[Point, list[SamplingRecord]] = collections.defaultdict(list)
    for record in records:
        at[Point(order.index(record.model), record.steps)].append(record)
    most = max(map(len, at.values()))
    at = {point: at[point] for point in sorted(at) if len(at[point]) == most}
    best = [_best(cells, score, sign) for cells in at.values()]
    return Curve(
        records[0].sampler,
        order,
        tuple(at),
        cost=np.array([cells[0].cost for cells in at.values()]),
        flops=np.array([cells[0].flops for cells in at.values()]),
        seconds=np.array([_seconds(cells) for cells in at.values()]),
        scores=np.stack([scores for scores, _ in best], axis=-1),
        guidance=np.stack([scales for _, scales in best], axis=-1),
    )


def _best(
    cells: Sequence[SamplingRecord], score: str, sign: float
) -> tuple[Float[np.ndarray, " resamples"], Float[np.ndarray, " resamples"]]:
    """The best score over scales of guidance, and the scale that has it, for all prompts and for each resample."""
    by_scale: dict[float, list[list[float]]] = collections.defaultdict(list)
    for cell in cells:
        by_scale[cell.guidance].append(list(cell.values[score]))
    scales = np.array(sorted(by_scale))
    values = np.array([np.mean(by_scale[scale], axis=0) for scale in scales])
    values = values[:, ~np.isnan(values[0])]
    means = sign * weights(values.shape[1]) @ values.T
    return means.max(axis=1), scales[means.argmax(axis=1)]


@functools.cache
def weights(count: int) -> Float[np.ndarray, "resamples prompts"]:
    """How much each prompt counts: all alike in row 0, as often as it is drawn in the others."""
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return np.concatenate([np.ones((1, count)), drawn]) / count


def _seconds(cells: Sequence[SamplingRecord]) -> float:
    """The median of what was measured, on one kind of chips; guidance and seed do not change it."""
    own = [cell for cell in cells if cell.chips == cells[0].chips]
    known = [cell.seconds for cell in own if cell.seconds is not None]
    return float(np.median(known)) if known else float("nan")


def interval(resampled: Float[np.ndarray, " resamples"], outside: float = 0.05) -> Estimate:
    """Row 0 with the middle of the others, all but a share of them; the count is that of resamples."""
    low, high = np.quantile(resampled[1:], [outside / 2, 1 - outside / 2])
    return Estimate(float(resampled[0]), float(low), float(high), len(resampled) - 1)


def pairs(curve: Curve, few: int = FEW) -> list[Pair]:
    """Every point of up to `few` steps with every smaller model that has points on both sides of its cost."""
    found = []
    for number, point in enumerate(curve.points):
        for smaller in range(point.model if point.steps <= few else 0):
            own = np.flatnonzero(curve.owners == smaller)
            if (scores := _at_cost(curve, own, curve.cost[number])) is not None:
                found.append(Pair(smaller, point, scores - curve.scores[:, number]))
    return found


def _at_cost(
    curve: Curve, own: Int[np.ndarray, " own"], cost: float
) -> Float[np.ndarray, " resamples"] | None:
    """The scores that points of one model would have at a cost; None outside of theirs."""
    own = own[np.argsort(curve.cost[own])]
    costs = np.log(curve.cost[own]) if own.size else np.array([np.inf])
    place = np.log(cost)
    if not costs[0] - ROUNDING <= place <= costs[-1] + ROUNDING:
        return None
    upper = min(int(np.searchsorted(costs, place - ROUNDING)), len(own) - 1)
    lower = max(upper - 1, 0)
    gap = costs[upper] - costs[lower]
    share = np.clip((place - costs[lower]) / gap, 0, 1) if gap else 1.0
    return (1 - share) * curve.scores[:, own[lower]] + share * curve.scores[:, own[upper]]


def smaller_is_better(curve: Curve, few: int = FEW) -> Finding:
    """Finding 3, "smaller models sample more efficiently": whether they win more than half of their `pairs`.

    A tie is half a win; the count is that of pairs. Where there is none nothing is decided, and the share is NaN.
    """
    found = pairs(curve, few)
    if not found:
        nothing = Estimate(math.nan, math.nan, math.nan, 0)
        return Finding(Verdict.UNDECIDED, nothing, np.full(1, np.nan))
    advantages = np.stack([pair.advantage for pair in found])
    won = np.where(np.abs(advantages) <= TIE, 0.5, advantages > 0).mean(axis=0)
    wins = interval(won)._replace(count=len(found))
    return Finding(above(wins, 0.5), wins, won)


def whatever_the_sampler(findings: Sequence[Finding]) -> Verdict:
    """Finding 4: that finding 3 holds with each sampler.

    All have to confirm it, and one refutes it: by an interval as much wider as there are samplers (Bonferroni), since
    the more of them are asked, the sooner one of them says so by chance.
    """
    outside = 0.05 / max(len(findings), 1)
    refuted = [
        above(interval(each.resampled, outside), 0.5) is Verdict.REFUTED
        for each in findings
        if each.wins.count
    ]
    if any(refuted):
        return Verdict.REFUTED
    confirmed = [each.verdict is Verdict.CONFIRMED for each in findings]
    return Verdict.CONFIRMED if confirmed and all(confirmed) else Verdict.UNDECIDED
