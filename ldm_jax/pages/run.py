"""One self-contained HTML page of a run.

What it reads in the run's directory, each part where it is there:

    config.json        the run's config
    metrics.jsonl      scalars by examples seen: {"examples": 5000, "step": 78, "loss": 0.31, ...}
    evaluations.jsonl  one an evaluation: {"examples": 20000, "scores": {name: [value, low, high, count]},
                       "validation": {"0.1": loss, ...}, "samples": "samples/000000020000.png"}
    samples/*.png      the first images of an evaluation as `evals.image_grids` lays them; true.png: the truth
    prompts.json       their prompts: [{"prompt": "...", "group": "held out"}, ...]
    references.json    scores to hold the run's against: {"untrained": {name: [...]}, ...}
    reconstructions.png  images of the data beside what the autoencoder gives back
    record.jsonl       the `RunRecord` of the finished run

A run that was killed and continued repeats lines: for one count of examples, the last value counts.
"""

import dataclasses
import html
import io
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from einops import rearrange
from etils import epath
from matplotlib.axes import Axes
from PIL import Image

from ldm_jax.evals.image_grids import RECONSTRUCTIONS
from ldm_jax.evals.journal import EvaluationLine, Prompt
from ldm_jax.files.flat import flat
from ldm_jax.files.ledger import read_records
from ldm_jax.files.lines import read_lines
from ldm_jax.files.typed_json import read_json
from ldm_jax.pages import elements, plots
from ldm_jax.pages.elements import COLUMNS, MAX_TILE
from ldm_jax.training.hooks import MetricsLine
from ldm_jax.training.record import RunRecord
from ldm_jax.types import Estimate

Line = dict[str, Any]

PARTS = ("config.json", "metrics.jsonl", "evaluations.jsonl", "prompts.json", "references.json")
MAX_SHEETS = 12  # grids on the page, evenly over the run


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run's directory holds; an empty value for each part that is not there."""

    workdir: epath.Path
    config: Line
    metrics: list[Line]
    evaluations: list[Line]
    prompts: list[Line]
    references: Mapping[str, Mapping[str, Estimate]]
    record: RunRecord | None


def read_run(workdir: epath.PathLike) -> Run:
    """Reads a run's directory.

    Raises:
      ValueError: the directory holds none of a run's files, or one of them cannot be read.
      FileNotFoundError: there is no such directory.
    """
    workdir = epath.Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"there is no directory {workdir}")
    if not any((workdir / part).is_file() for part in PARTS):
        raise ValueError(f"{workdir} holds no run: it has none of {', '.join(PARTS)}")
    return Run(
        workdir,
        config=_read_json(workdir / "config.json", dict, {}),
        metrics=_read_lines(workdir / "metrics.jsonl", MetricsLine),
        evaluations=_read_lines(workdir / "evaluations.jsonl", EvaluationLine),
        prompts=_read_json(workdir / "prompts.json", list[Prompt], []),
        references=_read_json(workdir / "references.json", dict[str, dict[str, Estimate]], {}),
        record=_last_record(workdir / "record.jsonl"),
    )


def page(run: Run) -> str:
    """The whole page; what the run does not have is said in its place."""
    styles, samples = _samples(run)
    return elements.fill(
        Path(__file__).with_suffix(".html"),
        title=html.escape(run.workdir.resolve().name),
        summary=html.escape(_summary(run)),
        styles=styles,
        samples=samples,
        reconstructions=_reconstructions(run),
        scores=_scores(run),
        losses=_losses(run),
        costs=_costs(run),
        config=_config(run),
    )


def _read_json(path: epath.Path, kind: Any, absent: Any) -> Any:
    return read_json(path, kind) if path.is_file() else absent


def _read_lines(path: epath.Path, kind: type) -> list[Line]:
    """The lines by examples, those of one count merged into one; none that is unfinished."""
    lines: dict[int, Line] = {}
    for line in read_lines(path, kind):
        lines[line["examples"]] = lines.get(line["examples"], {}) | line
    return [lines[examples] for examples in sorted(lines)]


def _last_record(path: epath.Path) -> RunRecord | None:
    records = read_records(RunRecord, path) if path.is_file() else []
    return max(records, key=lambda record: record.examples, default=None)


def _summary(run: Run) -> str:
    seen = max((line["examples"] for line in run.metrics + run.evaluations), default=0)
    parts = [f"{_short(seen)} examples"]
    if run.record:
        network = f"{_short(run.record.params)} parameters"
        parts = [network, *parts, f"{elements.duration(run.record.seconds)} on {run.record.chips}"]
    return " · ".join(parts)


def _samples(run: Run) -> tuple[str, str]:
    """The grids as style rules, and the gallery whose tiles show their places of the chosen grid."""
    found = [line for line in run.evaluations if (run.workdir / line.get("samples", "-")).is_file()]
    if not found:
        return "", elements.missing("No evaluation of this run has left a grid of images.")
    chosen = _spread(found, MAX_SHEETS)
    paths = [run.workdir / line["samples"] for line in chosen]
    labels = [f"after {line['examples']:,} examples" for line in chosen]
    last = len(chosen) - 1
    if (truth := run.workdir / "samples" / "true.png").is_file():
        paths.append(truth)
        labels.append("true images")
    sheets = [sheet(path) for path in paths]
    styles = "\n".join(
        f"  .sheet{i} .tile {{ background-image: url({elements.data_address(image)}); }}"
        for i, image in enumerate(sheets)
    )
    gallery = _gallery(run, sheets[last].height * COLUMNS // sheets[last].width)
    data = html.escape(json.dumps(labels))
    shown = f'<div class="sheet{last}" data-labels="{data}">{gallery}</div>'
    return styles, _slider(labels, last) + shown


def _spread(lines: list[Line], count: int) -> list[Line]:
    """At most so many of the lines, evenly, the first and the last among them."""
    chosen = np.linspace(0, len(lines) - 1, min(count, len(lines))).round().astype(int)
    return [lines[i] for i in chosen]


def sheet(path: epath.PathLike) -> Image.Image:
    """A grid without its gaps, its images no larger than the page shows them."""
    tiles = elements.cut_grid(path)
    joined = Image.fromarray(rearrange(tiles, "(r c) h w rgb -> (r h) (c w) rgb", c=COLUMNS))
    joined.thumbnail((COLUMNS * MAX_TILE, joined.height), Image.Resampling.LANCZOS)
    return joined


def _slider(labels: list[str], value: int) -> str:
    return (
        f'<div class="time"><input type="range" min="0" max="{len(labels) - 1}" value="{value}" '
        f'aria-label="examples seen"><output>{labels[value]}</output></div>'
    )


def _gallery(run: Run, rows: int) -> str:
    """The tiles under their prompts, by group."""
    count = min(COLUMNS * rows, run.config.get("eval", {}).get("shown", COLUMNS * rows))
    prompts = run.prompts or [{"prompt": ""}] * count
    tiles: dict[str, list[str]] = {}
    for i, line in enumerate(prompts[:count]):
        tiles.setdefault(line.get("group", ""), []).append(_tile(i, rows, line["prompt"]))
    parts = [] if run.prompts else [elements.missing("No prompts.json.")]
    for group in sorted(tiles):
        parts.append(f"<h3>prompts: {html.escape(group)}</h3>" if group else "")
        parts.append(f'<div class="gallery">{"".join(tiles[group])}</div>')
    return "".join(parts)


def _tile(index: int, rows: int, prompt: str) -> str:
    """One place of the grid, as a window on the grid that is `COLUMNS` times as wide."""
    row, column = divmod(index, COLUMNS)
    x, y = 100 * column / (COLUMNS - 1), 100 * row / max(1, rows - 1)
    place = f"background-size: {100 * COLUMNS}% {100 * rows}%; background-position: {x:g}% {y:g}%"
    return (
        f'<figure><div class="tile" style="{place}"></div>'
        f"<figcaption>{html.escape(prompt)}</figcaption></figure>"
    )


def _reconstructions(run: Run) -> str:
    """The picture that encoding left: the best that any model of these latents can draw."""
    path = run.workdir / RECONSTRUCTIONS
    if not path.is_file():
        return elements.missing(f"No {RECONSTRUCTIONS}: this run has encoded nothing here.")
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        address = elements.data_address(image.convert("RGB"))
    text = "Images of the data, each beside what the autoencoder gives back of it"
    return f'<p class="soft">{text}: no sample can be better.</p><img alt="{text}" src="{address}">'


def _scores(run: Run) -> str:
    scored = [line for line in run.evaluations if line.get("scores")]
    if not scored:
        return elements.missing("This run has not been evaluated.")
    names = list(dict.fromkeys(name for line in scored for name in line["scores"]))
    columns = {"this run": scored[-1]["scores"], **run.references}
    rows = [
        [name, *(elements.estimate(scores.get(name)) for scores in columns.values())]
        for name in names
    ]
    note = (
        "" if run.references else elements.missing("No references.json to hold the scores against.")
    )
    bases = dict.fromkeys(name.partition("/")[0] for name in names)
    charts = "".join(
        elements.chart(base, partial(_paint_score, run, scored, base)) for base in bases
    )
    note += elements.foreign(run.config)
    return elements.table(["", *columns], rows) + note + f'<div class="charts">{charts}</div>'


def _paint_score(run: Run, scored: list[Line], base: str, axes: Axes) -> None:
    """A score with its band, the same on each group of prompts, and what to hold it against."""
    names = [name for name in scored[-1]["scores"] if name.partition("/")[0] == base]
    groups = [name for name in names if name != base and not name.endswith("/gap")]
    for name, color in zip([base, *groups], (plots.BLUE, plots.GREEN, plots.ORANGE), strict=False):
        lines = [line for line in scored if name in line["scores"]]
        x = [line["examples"] for line in lines]
        estimates = [line["scores"][name] for line in lines]
        band = [e.low for e in estimates], [e.high for e in estimates]
        label = name.partition("/")[2] or "all"
        y = [e.value for e in estimates]
        plots.curve(axes, x, y, color=color, label=label, band=band if name == base else None)
    for label, scores in run.references.items():
        if base in scores:
            plots.level(axes, scores[base].value, label)
    if groups:
        axes.legend()
    plots.examples_axis(axes)


def _losses(run: Run) -> str:
    charts = []
    trained = [line for line in run.metrics if "loss" in line]
    if trained:
        charts.append(elements.chart("training", partial(_paint_loss, trained)))
    checked = [line for line in run.evaluations if line.get("validation")]
    if checked:
        charts.append(
            elements.chart("validation, by noise level", partial(_paint_validation, checked))
        )
    absent = [
        elements.missing(sentence)
        for lines, sentence in (
            (trained, "No line of metrics.jsonl has a loss."),
            (checked, "No evaluation has a validation loss."),
        )
        if not lines
    ]
    return f'<div class="charts">{"".join(charts)}</div>{"".join(absent)}'


def _paint_loss(lines: list[Line], axes: Axes) -> None:
    x = np.array([line["examples"] for line in lines])
    y = np.array([line["loss"] for line in lines], float)
    axes.plot(x, y, color=plots.BLUE, alpha=0.3, linewidth=0.8, label="as logged")
    axes.plot(x, _smooth(y, max(1.0, len(y) / 50)), color=plots.BLUE, label="smoothed")
    axes.legend()
    plots.examples_axis(axes)
    plots.positive_axis(axes, y)


def _smooth(y: np.ndarray, length: float) -> np.ndarray:
    """An exponential average over about `length` values that starts without a bias."""
    keep, total, weight = 1 - 1 / length, 0.0, 0.0
    result = np.empty_like(y)
    for i, value in enumerate(y):
        if np.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        result[i] = total / weight if weight else np.nan
    return result


def _paint_validation(lines: list[Line], axes: Axes) -> None:
    levels = sorted({level for line in lines for level in line["validation"]}, key=float)
    colors = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.85, len(levels)))
    for level, color in zip(levels, colors, strict=True):
        points = [
            (n["examples"], n["validation"][level]) for n in lines if level in n["validation"]
        ]
        plots.curve(axes, *zip(*points, strict=True), color=color, label=f"t = {level}")
    axes.legend(ncols=2)
    plots.examples_axis(axes)
    plots.positive_axis(axes, [y for line in lines for y in line["validation"].values()])


def _costs(run: Run) -> str:
    if run.record is None:
        return elements.missing("No record.jsonl: this run has not finished.")
    record = run.record
    rows = [
        ["parameters", f"{record.params:,}"],
        ["examples", f"{record.examples:,}"],
        ["GFLOPs per example", f"{record.flops / record.examples / 1e9:,.4g}"],
        ["FLOPs in all", f"{record.flops:.3g}"],
        ["time", elements.duration(record.seconds)],
        *(
            [["examples per second", f"{record.examples / record.seconds:,.4g}"]]
            if record.seconds
            else []
        ),
        ["chips", html.escape(record.chips)],
        ["commit", html.escape(record.commit or "unknown")],
        ["seed", str(record.seed)],
    ]
    return elements.table([], rows)


def _config(run: Run) -> str:
    if not run.config:
        return elements.missing("No config.json.")
    lines = (f"{name} = {json.dumps(value)}" for name, value in flat(run.config))
    text = html.escape("\n".join(lines))
    return f"<details><summary>All settings</summary><pre>{text}</pre></details>"


def _short(count: int) -> str:
    """A count in three digits: 866M, 12.8k."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"
