"""What the records of the study say: figures as PNG and SVG, one page, and the verdicts on findings 3 and 4."""

import html
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes

from ldm_jax.evals import LOWER_IS_BETTER
from ldm_jax.files.durable import write_atomically
from ldm_jax.files.ledger import read_records
from ldm_jax.pages import elements, plots
from ldm_jax.studies import efficiency
from ldm_jax.studies.efficiency import Curve, Finding
from ldm_jax.studies.pareto import frontier, stretches
from ldm_jax.studies.records import SamplingRecord
from ldm_jax.studies.verdicts import Verdict
from ldm_jax.types import Estimate

COLORS = matplotlib.colormaps["viridis_r"]
SMALL = (3.4, 2.8)  # inches of one chart among several
Paint = Callable[[Axes], None]
COSTS = {
    "cost": "relative cost of a pass x passes",
    "flops": "FLOPs of an image, guidance counted",
    "seconds": "seconds an image, drawn and looked at",
}


class Findings(NamedTuple):
    """What one score says: of finding 3 by sampler, and of finding 4."""

    score: str
    curves: list[Curve]
    by_sampler: dict[str, Finding]
    whatever: Verdict


def draw(
    directory: epath.PathLike, ledger: epath.PathLike, grid: str = "", commit: str = ""
) -> Iterator[str]:
    """Writes everything into `directory`; what people want to know of it, line by line.

    Of records of several grids or commits those whose names begin so, the newest of them.

    Raises:
      ValueError: there are none.
      FileNotFoundError: there is no such ledger.
    """
    directory = epath.Path(directory)
    groups = efficiency.groups(read_records(SamplingRecord, ledger))
    records = chosen(groups, grid, commit)
    notes = [*about(records, groups)]
    yield from notes
    found = [findings(records, score) for score in records[0].scores]
    for each in found:
        yield from told(each)
        for name, figure in figures(each).items():
            plots.save(figure, directory / f"{name}-{each.score}")
    verdicts = {each.score: as_json(each) for each in found}
    text = json.dumps({"about": notes, **verdicts}, indent=1, allow_nan=False)
    write_atomically(directory / "verdicts.json", text.encode())
    write_atomically(directory / "page.html", page(records, notes, found).encode())
    yield f"all of it in {directory / 'page.html'}"


def chosen(
    groups: Mapping[efficiency.Group, list[SamplingRecord]], grid: str, commit: str
) -> list[SamplingRecord]:
    """The newest group of a grid and a commit; "" is any."""
    found = [of for (_, g, c), of in groups.items() if g.startswith(grid) and c.startswith(commit)]
    if not found:
        known = "; ".join(f"grid {g} by {c or 'no commit'}" for _, g, c in groups) or "none"
        raise ValueError(f"there are no records of grid {grid!r} by commit {commit!r}: {known}")
    return found[-1]


def about(
    records: Sequence[SamplingRecord], groups: Mapping[efficiency.Group, list[SamplingRecord]]
) -> Iterator[str]:
    """What is drawn, what is kept apart, and what is missing."""
    first = records[0]
    of = f" of {first.cells}" if first.cells else ""
    chips = ", ".join(dict.fromkeys(record.chips for record in records))
    yield f"{len(records)}{of} cells of grid {first.grid} by commit {first.commit or 'unknown'} on {chips}"
    for (_, grid, by), others in groups.items():
        if others is not records:
            yield f"kept apart: {len(others)} cells of grid {grid} by commit {by or 'unknown'}"
    if len(records) < first.cells:
        yield "the study is not finished: verdicts are of what is there"
    yield from (f"incomplete, left out: {point}" for point in efficiency.incomplete(records))


def findings(records: Sequence[SamplingRecord], score: str) -> Findings:
    """The verdicts by one score."""
    curves = efficiency.curves(records, score, lower_is_better=score in LOWER_IS_BETTER)
    by_sampler = {curve.sampler: efficiency.smaller_is_better(curve) for curve in curves}
    whatever = efficiency.whatever_the_sampler([*by_sampler.values()])
    return Findings(score, curves, by_sampler, whatever)


def told(found: Findings) -> Iterator[str]:
    """Verdicts as sentences."""
    yield f"by {found.score}:"
    for sampler, finding in found.by_sampler.items():
        verdict = finding.verdict.value
        yield f"  smaller models are better at equal cost with {sampler}: {verdict} ({share(finding)})"
    yield f"  whatever the sampler: {found.whatever.value}"


def share(finding: Finding) -> str:
    """Of its comparisons the smaller model wins so many."""
    wins = finding.wins
    if not wins.count:
        return "nothing to compare"
    return f"{wins.value:.0%} of {wins.count} comparisons, {wins.low:.0%} to {wins.high:.0%}"


def as_json(found: Findings) -> dict[str, object]:
    """The same for programs."""
    by_sampler = {
        sampler: {
            "verdict": finding.verdict.name.lower(),
            "wins": finding.wins if finding.wins.count else None,
        }
        for sampler, finding in found.by_sampler.items()
    }
    return {"smaller_is_better": by_sampler, "whatever_the_sampler": found.whatever.name.lower()}


def figures(found: Findings) -> dict[str, plots.Figure]:
    """The figures of one score by name."""
    first = found.curves[0]
    against = {what: efficiency_chart(found, first, what) for what in COSTS}
    samplers = {curve.sampler: efficiency_chart(found, curve, "cost") for curve in found.curves}
    against = {f"{first.sampler}, {what}": paint for what, paint in against.items()}
    return {
        "efficiency": plots.charts(against, size=SMALL),
        "guidance": plots.charts({"Best guidance": heat_map(first)}, size=(4.6, 3.2)),
        "samplers": plots.charts(samplers, size=SMALL),
    }


def color(curve: Curve, model: int) -> tuple[float, ...]:
    """Of a model: the larger the darker."""
    return COLORS(0.08 + 0.84 * model / max(len(curve.models) - 1, 1))


def sign(score: str) -> int:
    """Of what is drawn: scores as they are, not as `Curve` has them."""
    return -1 if score in LOWER_IS_BETTER else 1


def efficiency_chart(found: Findings, curve: Curve, what: str) -> Paint:
    """Score against one of `COSTS`, a line a model, and the frontier below them."""
    x, way = getattr(curve, what), sign(found.score)
    values, lows, highs = (way * column for column in np.array(curve.estimates())[:, :3].T)

    def paint(axes: Axes) -> None:
        best = frontier(x, curve.scores[0]) if np.isfinite(x).all() else []
        axes.plot(x[best], values[best], color=plots.GREY, linewidth=5, alpha=0.35)
        for model, name in enumerate(curve.models):
            own = np.flatnonzero(curve.owners == model)
            bars = np.abs(np.stack([lows[own], highs[own]]) - values[own])
            axes.errorbar(
                *(x[own], values[own], bars),
                color=color(curve, model),
                label=name,
                marker="o",
                markersize=3.5,
                capsize=2,
            )
        plots.log_axis(axes.xaxis, x)
        axes.set_xlabel(COSTS[what])
        axes.set_ylabel(found.score + (", lower is better" if way < 0 else ""))
        axes.legend()

    return paint


def heat_map(curve: Curve) -> Paint:
    """The best scale of guidance by model and steps, and the share of resamples that agree."""

    def paint(axes: Axes) -> None:
        scales = np.unique(curve.guidance)
        table = np.full((len(curve.models), len(curve.steps)), np.nan)
        for number, point in enumerate(curve.points):
            row, column = point.model, curve.steps.index(point.steps)
            best = curve.guidance[:, number]
            table[row, column] = np.searchsorted(scales, best[0])
            text = f"{best[0]:g}\n{np.mean(best[1:] == best[0]):.0%}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8)
        axes.imshow(table, cmap="Blues", vmin=-0.5, vmax=1.6 * len(scales), aspect="auto")
        axes.grid(visible=False)
        axes.set_xticks(range(len(curve.steps)), map(str, curve.steps))
        axes.set_yticks(range(len(curve.models)), curve.models)
        axes.set_xlabel("steps")

    return paint


def page(records: Sequence[SamplingRecord], notes: Sequence[str], found: Sequence[Findings]) -> str:
    """One self-contained page."""
    seeds, prompts = len({each.seed for each in records}), len(records[0].values[found[0].score])
    samplers = [curve.sampler for curve in found[0].curves]
    count = f"{len(found[0].curves[0].models)} models, {prompts} prompts, {seeds} seeds"
    how = (
        f"Scores of {samplers[0]} are at the guidance that is best for a model and its steps by each score, those of"
        f" {', '.join(samplers[1:]) or 'others'} at the one that {found[0].score} chose for {samplers[0]}."
    )
    return elements.fill(
        Path(__file__).with_name("template.html"),
        summary=html.escape(f"{count}; {'; '.join(notes)}. {how}"),
        sections="".join(itertools.chain.from_iterable(map(section, found))),
    )


def section(found: Findings) -> Iterator[str]:
    """All that one score says."""
    first = found.curves[0]
    yield f"<section><h2>By {html.escape(found.score)}</h2>"
    head = ("finding", "verdict", "comparisons that the smaller model wins")
    rows = [
        [
            f"3: smaller is better at equal cost, {sampler}",
            f"<b>{finding.verdict.value}</b>",
            html.escape(share(finding)),
        ]
        for sampler, finding in found.by_sampler.items()
    ]
    yield elements.table(
        head, [*rows, ["4: whatever the sampler", f"<b>{found.whatever.value}</b>", ""]]
    )
    yield "<h3>Who has the best score at each cost</h3>"
    yield elements.table(
        ("sampler", "model", "from", "to", "resamples that agree"), [*owned(found)]
    )
    yield '<h3>Score against cost</h3><div class="charts">'
    yield from (
        elements.chart(
            f"{first.sampler}, {what}: {found.score}", efficiency_chart(found, first, what)
        )
        for what in COSTS
    )
    yield f'</div><h3>The best guidance, {first.sampler}</h3><div class="charts">'
    yield elements.chart(f"best guidance by {found.score}", heat_map(first))
    yield '</div><h3>Every sampler</h3><div class="charts">'
    for curve in found.curves:
        yield elements.chart(
            f"{curve.sampler}: {found.score}", efficiency_chart(found, curve, "cost")
        )
    yield "</div><h3>Every point</h3>"
    yield elements.table(
        ("sampler", "model", "steps", "cost", "guidance", found.score), [*points(found)]
    )
    yield "</section>"


def owned(found: Findings) -> Iterator[list[str]]:
    """The stretches of the frontier."""
    for curve in found.curves:
        for low, high, owner, share in stretches(curve.cost, curve.scores, curve.owners):
            end = elements.number(high) if np.isfinite(high) else "the end"
            yield [curve.sampler, curve.models[owner], elements.number(low), end, f"{share:.0%}"]


def points(found: Findings) -> Iterator[list[str]]:
    """Every point with its interval."""
    for curve in found.curves:
        for number, (model, steps) in enumerate(curve.points):
            value, low, high, count = curve.estimates()[number]
            shown = (value, low, high) if sign(found.score) > 0 else (-value, -high, -low)
            yield [
                curve.sampler,
                curve.models[model],
                str(steps),
                elements.number(curve.cost[number]),
                f"{curve.guidance[0, number]:g}",
                elements.estimate(Estimate(*shown, count)),
            ]
