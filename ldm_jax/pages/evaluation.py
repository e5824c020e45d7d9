"""One self-contained HTML page of all evaluations in a directory: a table, charts, samples, best and worst.

It reads scores.jsonl, one line an evaluation, and the pictures that the lines name. Scores on different prompts never
stand in one table.
"""

import html
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from matplotlib.axes import Axes
from PIL import Image

from ldm_jax.evals import LOWER_IS_BETTER
from ldm_jax.files.flat import flat
from ldm_jax.pages import elements, plots, standings
from ldm_jax.pages.standings import Evaluation
from ldm_jax.types import Estimate

Line = dict[str, Any]

EXACT = 64  # pixels of a side up to which images go onto the page as they are, and not as JPEG
COLORS = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.PURPLE)
DASHES = ("-", "--", ":")
PICTURES = {"samples": "Samples", "best": "Best", "worst": "Worst"}
HOW_MARKED = (
    "A score is marked best where its interval of 95% and that of the next best do not overlap; a row over several"
    " seeds stands for the rows of its seeds."
)
NONE = "<small>none</small>"


def evaluation_page(workdir: epath.PathLike) -> str:
    """The whole page; what an evaluation does not have is said in its place.

    Raises ValueError where nothing has been evaluated.
    """
    workdir = epath.Path(workdir)
    groups = standings.by_prompts(standings.read_evaluations(workdir))
    sections = [_section(workdir, group, alone=len(groups) == 1) for group in groups]
    return elements.fill(
        Path(__file__).with_suffix(".html"),
        title=html.escape(f"Evaluation of {workdir.resolve().name}"),
        summary=html.escape(_summary(groups)),
        sections="".join(sections),
    )


def _summary(groups: list[list[Evaluation]]) -> str:
    kinds = [each.is_summary for group in groups for each in group]
    parts = [_counted(kinds.count(False), "evaluation")]
    if any(kinds):
        parts.append(f"{sum(kinds)} over several seeds")
    text = " · ".join(parts)
    if len(groups) == 1:
        return text
    return (
        f"{text}. They are on {len(groups)} different sets of prompts, and scores on different prompts cannot be"
        " compared: each set has a table of its own."
    )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _section(workdir: epath.Path, group: list[Evaluation], *, alone: bool) -> str:
    """All that is said of one set of prompts; its charts are named after it where it is not `alone`."""
    count, spec = group[0].prompts.get("count"), group[0].prompts.get("spec")
    title = (
        f"{'Prompts' if count is None else _counted(count, 'prompt')} of {spec or 'unknown source'}"
    )
    unlike = standings.differences(group)
    names = standings.main_scores(group)
    suffix = "" if alone else f", prompts {str(group[0].prompts.get('digest'))[:8]}"
    return "".join(
        [
            f"<section><h2>{html.escape(title)}</h2>",
            _about(group),
            "<h3>Scores</h3>",
            *map(_unlike, unlike),
            *dict.fromkeys(elements.foreign(each.line.get("config", {})) for each in group),
            _scores(group, names, marked=not unlike),
            "<h3>Scores against guidance</h3>",
            _charts(group, names, suffix),
            "<h3>One by one</h3>",
            *(_details(workdir, each, opened=len(group) == 1) for each in group),
            "</section>",
        ]
    )


def _unlike(name: str) -> str:
    return elements.missing(
        f"These rows do not all have the same {name}, so what depends on it cannot be compared, and no score is marked"
        " as best."
    )


def _about(group: list[Evaluation]) -> str:
    """What was evaluated, on what, against what, and with which code, each thing once."""
    lines = [each.line for each in group]
    rows = {
        "evaluated": (_named(line.get("model", {})) for line in lines),
        "prompts": (line.get("prompts", {}).get("spec") for line in lines),
        "digest of the prompts": (group[0].prompts.get("digest"),),
        "reference": (_plain(line.get("reference")) for line in lines),
        "networks": itertools.chain.from_iterable(map(_networks, lines)),
        "code": (line.get("commit") for line in lines),
        "chips": (line.get("chips") for line in lines),
    }
    return elements.table([], [[name, _distinct(values)] for name, values in rows.items()])


def _networks(line: Line) -> Iterator[str]:
    for name, (fingerprint, preprocessing) in sorted(line.get("networks", {}).items()):
        yield f"{name}: {fingerprint} ({preprocessing})"


def _distinct(values: Iterable[str | None]) -> str:
    """Different texts line by line, as HTML."""
    return "<br>".join(map(html.escape, dict.fromkeys(filter(None, values)))) or NONE


def _named(settings: Line) -> str:
    """Settings in one line: "examples 80,000, weights ema"."""
    return ", ".join(f"{_title(name)} {_plain(value)}" for name, value in flat(settings))


def _title(name: str) -> str:
    return name.removesuffix(".name")


def _plain(value: Any) -> str:
    """A setting as people write it; nothing for None."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _scores(group: list[Evaluation], names: list[str], *, marked: bool) -> str:
    """The table: a row an evaluation, a column for what differs between them and for each score."""
    settings = standings.varying(group)
    best = {name: standings.best_of(group, name) for name in names if marked}
    heads = [_head("evaluation"), *(_head(_title(name)) for name in settings)]
    heads += [_score_head(name) for name in names]
    rows = "".join(_row(each, settings, names, best) for each in group)
    return (
        '<div class="table scores"><table class="sortable">'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="soft">{HOW_MARKED if marked else ""} The headings sort.</p>'
    )


def _head(title: str, *, first: str = "ascending", note: str = "") -> str:
    """A heading that sorts by its column, in the order `first` when it is pressed first."""
    button = f'<button type="button">{html.escape(title)}</button>'
    return f'<th scope="col" data-first="{first}">{button}{note}</th>'


def _score_head(name: str) -> str:
    low = name in LOWER_IS_BETTER
    note = f"<small>{'lower' if low else 'higher'} is better</small>"
    return _head(name, first="ascending" if low else "descending", note=note)


def _row(
    each: Evaluation, settings: list[str], names: list[str], best: dict[str, Evaluation | None]
) -> str:
    note = f"<small>over {len(each.seeds)} seeds</small>" if each.is_summary else ""
    first = f'<th scope="row" data-value="{html.escape(each.name)}">'
    first += f'<a href="#{each.anchor}">{html.escape(each.name)}</a>{note}</th>'
    cells = [_setting_cell(each.shown.get(name)) for name in settings]
    cells += [_score_cell(each.scores.get(name), best.get(name) is each) for name in names]
    return f'<tr class="{"summary" if each.is_summary else "single"}">{first}{"".join(cells)}</tr>'


def _setting_cell(value: Any) -> str:
    if value is None:
        return f'<td data-value="">{NONE}</td>'
    sorted_by = html.escape(value if isinstance(value, str) else json.dumps(value))
    return f'<td data-value="{sorted_by}">{html.escape(_plain(value))}</td>'


def _score_cell(score: Estimate | None, is_best: bool) -> str:
    if score is None:
        return '<td data-value=""><small>not scored</small></td>'
    sorted_by = "" if math.isnan(score.value) else json.dumps(score.value)
    mark = " <mark>best</mark>" if is_best else ""
    value = f"<b>{elements.number(score.value)}</b>{mark}"
    return f'<td data-value="{sorted_by}">{value}<small>{elements.interval(score)}</small></td>'


def _charts(group: list[Evaluation], names: list[str], suffix: str) -> str:
    """A chart for each score that has been seen at several guidances."""
    drawn = []
    for name in names:
        lines = _lines(group, name)
        if len({x for points in lines.values() for x, _ in points}) > 1:
            size = (elements.CHART[0], elements.CHART[1] + 0.17 * len(lines))
            drawn.append(elements.chart(name + suffix, partial(_paint, lines), size))
    if not drawn:
        return elements.missing("No score is known at several guidances.")
    return f'<div class="charts">{"".join(drawn)}</div>'


def _lines(group: list[Evaluation], name: str) -> dict[str, list[tuple[float, Estimate]]]:
    """Guidance and score, by what else differs between the evaluations of a model."""
    contenders = [each for each in standings.contenders(group) if "guidance" in each.settings]
    varying = [each for each in standings.varying(contenders) if each != "guidance"]
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for each in contenders:
        if name in each.scores and math.isfinite(each.scores[name].value):
            point = float(each.settings["guidance"]), each.scores[name]
            lines.setdefault(_label(each.shown, varying), []).append(point)
    return {label: sorted(points) for label, points in lines.items()}


def _label(settings: dict[str, Any], varying: list[str]) -> str:
    """The sampler and its steps, and what else differs."""
    parts = [str(settings.get("sampler.name", "")), f"{_plain(settings.get('steps'))} steps"]
    others = [
        name for name in varying if name not in ("sampler.name", "steps") and name in settings
    ]
    return ", ".join([*parts, *(f"{_title(name)} {_plain(settings[name])}" for name in others)])


def _paint(lines: dict[str, list[tuple[float, Estimate]]], axes: Axes) -> None:
    """The lines, each a little beside the one before it, so that their intervals can be told apart."""
    every = [x for points in lines.values() for x, _ in points]
    shifts = 0.012 * (max(every) - min(every)) * (np.arange(len(lines)) - (len(lines) - 1) / 2)
    styles = itertools.cycle(itertools.product(DASHES, COLORS))
    for (label, points), shift, style in zip(lines.items(), shifts, styles, strict=False):
        _curve(points, shift, style, label, axes)
    axes.set_xlabel("guidance")
    axes.figure.legend(loc="outside lower left")


def _curve(
    points: list[tuple[float, Estimate]],
    shift: float,
    style: tuple[str, str],
    label: str,
    axes: Axes,
) -> None:
    x = [guidance + shift for guidance, _ in points]
    value, low, high = np.array([score[:3] for _, score in points]).T
    bars = np.maximum(0, [value - low, high - value])
    line = {"linestyle": style[0], "color": style[1], "marker": "o", "markersize": 3.2}
    axes.errorbar(x, value, bars, label=label, capsize=2, elinewidth=1, **line)


def _details(workdir: epath.Path, each: Evaluation, *, opened: bool) -> str:
    """The section of one evaluation."""
    parts = [
        *_pictures(workdir, each),
        "<h4>All scores, and by group of prompts</h4>",
        _all_scores(each),
        "<h4>How it was made</h4>",
        _facts(each),
    ]
    name = html.escape(each.name)
    note = f" <small>over {len(each.seeds)} seeds</small>" if each.is_summary else ""
    head = f"<summary>{name}{note}</summary>"
    return (
        f'<details id="{each.anchor}"{" open" if opened else ""}>{head}{"".join(parts)}</details>'
    )


def _all_scores(each: Evaluation) -> str:
    if not each.scores:
        return elements.missing("It has no scores.")
    names = sorted(each.scores, key=lambda name: name.partition("/")[0])
    return elements.table([], [[name, elements.estimate(each.scores[name])] for name in names])


def _facts(each: Evaluation) -> str:
    """How an evaluation was made: settings, losses, time and code."""
    line = each.line
    facts = {_title(name): _plain(value) for name, value in each.shown.items()}
    losses = line.get("validation") or {}
    facts |= {f"validation loss at t = {t}": _value(losses[t]) for t in sorted(losses, key=float)}
    if not losses:
        facts["validation loss"] = ""
    if line.get("seconds"):
        facts["time"] = elements.duration(line["seconds"])
    if line.get("images_per_second"):
        facts["images per second"] = f"{line['images_per_second']:.3g}"
    facts |= {name: line.get(name) or "" for name in ("chips", "commit")}
    return elements.table([], [[name, html.escape(text) or NONE] for name, text in facts.items()])


def _value(number: int | float | None) -> str:
    return elements.number(math.nan if number is None else number)


def _pictures(workdir: epath.Path, each: Evaluation) -> Iterator[str]:
    pictures = each.line.get("pictures") or {}
    if each.is_summary and not pictures:
        yield elements.missing("Its pictures are in the sections of its seeds.")
        return
    for kind, title in PICTURES.items():
        row = pictures.get(kind)
        by = f" by {row['score']}" if row and row.get("score") else ""
        yield f"<h4>{html.escape(title + by)}</h4>"
        yield _gallery(workdir, row) if row else elements.missing("None were kept.")


def _gallery(workdir: epath.Path, row: Line) -> str:
    """The images of a picture, each with its prompt, and its value where it has one."""
    try:
        images = elements.cut_grid(workdir / row["file"])
    except OSError:
        return elements.missing(f"{row['file']} is not there or cannot be read.")
    values = map(_value, row["values"]) if row.get("values") else itertools.repeat("")
    tiles = map(_tile, images, row["prompts"], values)
    return f'<div class="gallery">{"".join(tiles)}</div>'


def _tile(pixels: UInt8[np.ndarray, "rows columns 3"], prompt: str, value: str) -> str:
    text = html.escape(prompt)
    above = f"<b>{html.escape(value)}</b> " if value else ""
    image = f'<img class="tile" alt="{text}" title="{text}" src="{_address(pixels)}">'
    return f"<figure>{image}<figcaption>{above}{text}</figcaption></figure>"


def _address(pixels: UInt8[np.ndarray, "rows columns 3"]) -> str:
    """Small images as they are, others as JPEG no larger than the page shows them."""
    image = Image.fromarray(pixels)
    if max(image.size) <= EXACT:
        return elements.data_address(image)
    image.thumbnail((elements.MAX_TILE, elements.MAX_TILE), Image.Resampling.LANCZOS)
    return elements.data_address(image, "jpeg", quality=90, subsampling=0)
