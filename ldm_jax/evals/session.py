"""Evaluations of one call: each is made where it stopped, scored, shown and written down.

Of several processes all draw and look; the first one writes.
"""

import collections
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
from etils import epath
from tqdm import tqdm

from ldm_jax.evals import LOWER_IS_BETTER
from ldm_jax.evals.cells import DIRECTORY, Cell, check_comparable, read_cell
from ldm_jax.evals.evaluator import Part, refuse_nan
from ldm_jax.evals.features import Features, count_of
from ldm_jax.evals.image_grids import save_grid, save_png
from ldm_jax.evals.scores import Scores
from ldm_jax.files.durable import write_atomically
from ldm_jax.files.ledger import commit
from ldm_jax.files.lines import append_line, read_lines
from ldm_jax.files.typed_json import write_json
from ldm_jax.metrics.paired import Paired
from ldm_jax.parallel import distributed
from ldm_jax.types import Estimate, Pixels

PATIENCE = 5  # seconds before progress is shown
EXTREMES = 8  # images that are shown as best, and as worst
SAME = ("reference_digest", "validated_by")  # what else a record's numbers depend on
RECORDS, COMPARISONS = "scores.jsonl", "comparisons.jsonl"


class Pictures(TypedDict):
    """Images side by side in a file, their prompts, and the values by which they were chosen."""

    file: str
    prompts: list[str]
    score: NotRequired[str]
    values: NotRequired[list[float]]


class PromptSet(TypedDict):
    """The prompts of an evaluation."""

    spec: NotRequired[str | None]
    digest: NotRequired[str | None]
    count: NotRequired[int | None]


class ScoreLine(TypedDict):
    """A line of scores.jsonl, as far as it is read again."""

    cell: str
    model: NotRequired[dict[str, Any]]
    sampling: NotRequired[dict[str, Any]]
    prompts: NotRequired[PromptSet]
    networks: NotRequired[dict[str, list[str]]]
    seeds: NotRequired[list[int] | None]
    over: NotRequired[list[str] | None]
    scores: NotRequired[dict[str, Estimate]]
    validation: NotRequired[dict[str, float | None] | None]
    pictures: NotRequired[dict[str, Pictures] | None]
    drawn: NotRequired[int]
    seconds: NotRequired[float]
    images_per_second: NotRequired[float]
    config: NotRequired[dict[str, Any]]


class Work(NamedTuple):
    """One evaluation to be made: its name but for the digest, and what it depends on.

    `parts(start=..., kept=...)` gives features, and the first `kept` images, by the number of their first prompt, from
    `start` on; `images(numbers)` gives those of some prompts.
    """

    label: str
    facts: dict[str, Any]
    parts: Callable[..., Iterator[tuple[int, Part]]]
    images: Callable[[Sequence[int]], Pixels]


class Session(NamedTuple):
    """What the evaluations of one call share; `described` goes into every record of them."""

    workdir: epath.Path
    scores: Scores
    validation: Mapping[str, float]
    shown: int  # images that are shown of each, beside the best and the worst
    keep: bool  # whether all are written
    described: Mapping[str, Any]


def evaluated(session: Session, work: Work, cell: Cell) -> dict[str, Any]:
    """The record of an evaluation, which is made if it is not there, from where it stopped."""
    line = recorded(session, cell)
    if distributed.agreed(line is not None):
        complete(session, work, cell)
        return line or {}
    begun = time.perf_counter()
    drawn, rate = look(session, work, cell)
    complete(session, work, cell)
    features = cell.finish() if distributed.is_first() else None
    pictures = picture(session, work, cell, features)
    if features is None:
        return {}
    line = {
        **record(session, cell, features),
        "seconds": round(time.perf_counter() - begun, 3),
        "drawn": drawn,
        "images_per_second": round(rate, 3),
        "pictures": pictures,
    }
    append_line(session.workdir / RECORDS, line)
    return line


def recorded(session: Session, cell: Cell) -> dict[str, Any] | None:
    """The last record of a finished evaluation that has the same scores; the first process looks."""
    if not (distributed.is_first() and cell.finished):
        return None
    found = [
        line
        for line in read_lines(session.workdir / RECORDS, ScoreLine)
        if line["cell"] == cell.name
        and line.get("metrics") == list(session.scores.metrics)
        and all(line.get(name) == session.described[name] for name in SAME)
    ]
    return found[-1] if found else None


def look(session: Session, work: Work, cell: Cell) -> tuple[int, float]:
    """Makes the features that are not there; so many images, and how many a second after the first batch.

    Images that fill the last batch up count as drawn. Of one batch alone the rate is with what it compiles.
    """
    count, start = len(session.scores.prompts.texts), 0
    if distributed.is_first():
        start = count if cell.finished else cell.begin()
    start = distributed.agreed(start)
    if start == count:
        return 0, 0.0
    times, ends = [time.perf_counter()], [start]
    bar = tqdm(
        total=count,
        initial=start,
        unit=" images",
        delay=PATIENCE,
        disable=not distributed.is_first(),
    )
    bar.set_description(work.label)
    with bar:
        for first, part in work.parts(start=start, kept=count if session.keep else 0):
            take(session, cell, first, part)
            ends.append(first + count_of(part.features))
            times.append(time.perf_counter())
            bar.update(ends[-1] - ends[-2])
    since = 1 if len(times) > 2 else 0  # the first batch compiles
    batch = max(np.diff(ends))
    return count - start, float(batch * (len(times) - 1 - since) / (times[-1] - times[since]))


def take(session: Session, cell: Cell, first: int, part: Part) -> None:
    """Keeps what came of a batch, which the first process writes. Raises ValueError as `check_finite`."""
    check_finite(session, first, part.features, cell.facts["noise"][1:])
    if not distributed.is_first():
        return
    if part.images is not None:
        keep(cell, range(first, first + len(part.images)), part.images)
    cell.add(first, part.features)


def check_finite(
    session: Session, first: int, features: Features, seeds: Sequence[int] = ()
) -> None:
    """Raises ValueError for an image that is NaN; it is named by its prompt and, where `seeds` holds one, the seed."""
    broken = [
        np.isnan(each).reshape(len(each), -1).any(axis=1)
        for by_name in features.values()
        for each in by_name.values()
    ]
    numbers = range(first, first + count_of(features))
    texts = session.scores.prompts.texts[first:]
    refuse_nan(np.any(broken, axis=0), numbers, texts, seeds * len(numbers))


def keep(cell: Cell, numbers: Iterable[int], images: Pixels) -> None:
    """Writes images by the numbers of their prompts."""
    (cell.path / "images").mkdir(parents=True, exist_ok=True)
    for number, pixels in zip(numbers, images, strict=True):
        save_png(_kept(cell, number), pixels)


def complete(session: Session, work: Work, cell: Cell) -> None:
    """Where images are kept: draws those that are not there, and writes which prompt each belongs to."""
    if not session.keep:
        return
    texts = session.scores.prompts.texts
    missing = [n for n in range(len(texts)) if not _kept(cell, n).exists()]
    missing = distributed.agreed_numbers(missing, len(texts))
    for first in range(0, len(missing), session.shown):
        numbers = missing[first : first + session.shown]
        images = work.images(numbers)
        if distributed.is_first():
            keep(cell, numbers, images)
    if distributed.is_first():
        rows = [{"file_name": _kept(cell, n).name, "text": text} for n, text in enumerate(texts)]
        content = "".join(write_json(row) + "\n" for row in rows)
        write_atomically(cell.path / "images" / "metadata.jsonl", content.encode())


def _kept(cell: Cell, number: int) -> epath.Path:
    return cell.path / "images" / f"{number:06d}.png"


class Shown(NamedTuple):
    """Images that are shown: numbers of prompts, and by what score and with which values they were chosen."""

    numbers: list[int]
    score: str = ""
    values: tuple[float, ...] = ()


def choose(session: Session, features: Features) -> dict[str, Shown]:
    """The first images, and the best and the worst by the first score that is of images."""
    count = len(session.scores.prompts.texts)
    chosen = {"samples": Shown(list(range(min(session.shown, count))))}
    values = session.scores.values(features)
    if not values:
        return chosen
    name = next(iter(values))
    ranks = [int(i) for i in np.argsort(values[name]) if np.isfinite(values[name][i])]
    size = min(EXTREMES, len(ranks) // 2)
    if size:
        worst, best = ranks[:size], ranks[::-1][:size]
        if name in LOWER_IS_BETTER:
            worst, best = best, worst
        for kind, numbers in (("best", best), ("worst", worst)):
            of_them = tuple(float(values[name][i]) for i in numbers)
            chosen[kind] = Shown(numbers, name, of_them)
    return chosen


def picture(
    session: Session, work: Work, cell: Cell, features: Features | None
) -> dict[str, dict[str, Any]]:
    """Writes the images that are chosen, side by side; all processes draw them, and the first one has the features."""
    chosen = choose(session, features) if features is not None else {}
    most = session.shown + 2 * EXTREMES
    numbers = [number for shown in chosen.values() for number in shown.numbers]
    images = work.images(distributed.agreed_numbers(numbers, most))
    pictures = {}
    for kind, shown in chosen.items():
        part, images = np.split(images, [len(shown.numbers)])
        save_grid(cell.path / f"{kind}.png", part)
        prompts = [session.scores.prompts.texts[number] for number in shown.numbers]
        row = {"file": f"{DIRECTORY}/{cell.name}/{kind}.png", "prompts": prompts}
        pictures[kind] = row | (
            {"score": shown.score, "values": shown.values} if shown.score else {}
        )
    return pictures


def record(session: Session, cell: Cell, features: Features) -> dict[str, Any]:
    """What a line of the record says of one evaluation, all but the time that it took."""
    return {
        "cell": cell.name,
        **described(cell.facts),
        "seeds": cell.facts["noise"][1:],
        "metrics": list(session.scores.metrics),
        "scores": session.scores(features),
        "validation": session.validation,
        "chips": distributed.machine(),
        "commit": commit(),
        **session.described,
    }


def described(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that evaluations of several seeds share."""
    return {name: value for name, value in facts.items() if name != "noise"}


def seeds_of(cells: Mapping[Cell, Any]) -> list[list[Cell]]:
    """Cells that differ in their seeds alone, where there are several."""
    groups = collections.defaultdict(list)
    for cell in cells:
        groups[write_json(described(cell.facts), sort_keys=True)].append(cell)
    return [group for group in groups.values() if len(group) > 1]


def over_seeds(session: Session, cells: Sequence[Cell]) -> dict[str, Any]:
    """The record of several seeds together, which is written down too."""
    features = [cell.finish() for cell in cells]
    seeds = [cell.facts["noise"][1] for cell in cells]
    first = record(session, cells[0], features[0])
    name = re.sub(r"-s\d+-", f"-s{'+'.join(map(str, seeds))}-", cells[0].name)
    line = first | {"cell": name, "seeds": seeds, "scores": session.scores(*features)}
    _append_once(session.workdir / RECORDS, line)
    return line


def over_runs(session: Session, cell: Cell, others: Sequence[str]) -> dict[str, Any]:
    """The record of an evaluation together with those of runs of other seeds, which is written down too.

    Raises FileNotFoundError, ValueError: as `compared`.
    """
    features = [cell.finish()]
    for other in others:
        theirs, facts = read_cell(other)
        check_comparable(cell.facts, facts, "sampling")
        features.append(theirs)
    name = f"{cell.name}-of-{len(features)}-runs"
    scores = session.scores.over_runs(features)
    line = record(session, cell, features[0]) | {"cell": name, "over": others, "scores": scores}
    _append_once(session.workdir / RECORDS, line)
    return line


def compared(session: Session, cell: Cell, against: str) -> dict[str, Paired]:
    """Every score less that of another evaluation on the same prompts, with its test; it is written down too.

    Raises FileNotFoundError, ValueError: `against` is no finished evaluation, or one of other prompts or networks.
    """
    theirs, facts = read_cell(against)
    check_comparable(cell.facts, facts)
    found = session.scores.paired(cell.finish(), theirs)
    line = {"cell": cell.name, "against": against, "differences": found}
    line |= {name: session.described[name] for name in ("reference", "reference_digest")}
    append_line(session.workdir / COMPARISONS, line)
    return found


def _append_once(path: epath.PathLike, line: Mapping[str, Any]) -> None:
    """Adds a line that is not there yet."""
    text = write_json(line)  # as text: NaN is not equal to NaN
    if text not in map(write_json, read_lines(path)):
        append_line(path, line)
