"""Evaluations that were written down: which can be compared, in what they differ, and which is best."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from etils import epath

from ldm_jax.evals import LOWER_IS_BETTER
from ldm_jax.evals.session import RECORDS, ScoreLine
from ldm_jax.files.flat import flat
from ldm_jax.files.lines import read_lines
from ldm_jax.types import Estimate


class Evaluation(NamedTuple):
    """A line of scores.jsonl.

    Attributes:
      anchor: of its section on the page.
      settings: of model and sampling, one by one: {"examples": 80000, "sampler.name": "ddim", "steps": 20}.
      seeds: one; several of a summary over them; none of images that were given.
    """

    anchor: str
    name: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    scores: dict[str, Estimate]
    line: dict[str, Any]

    @property
    def prompts(self) -> dict[str, Any]:
        """The prompts: `spec`, `digest` and `count`, what is known of them."""
        return self.line.get("prompts", {})

    @property
    def shown(self) -> dict[str, Any]:
        """Everything by which two evaluations may differ."""
        runs = {"runs": 1 + len(self.line["over"])} if self.line.get("over") else {}
        seeds = {"seeds": ", ".join(map(str, self.seeds))} if self.seeds else {}
        return self.settings | seeds | runs

    @property
    def is_summary(self) -> bool:
        """Whether it is of several seeds, of sampling or of runs, together."""
        return len(self.seeds) > 1 or bool(self.line.get("over"))


def read_evaluations(workdir: epath.PathLike) -> list[Evaluation]:
    """Every evaluation once, as its last line says; summaries over seeds come first. Raises ValueError for none."""
    lines = {line["cell"]: line for line in read_lines(epath.Path(workdir) / RECORDS, ScoreLine)}
    if not lines:
        raise ValueError(f"{workdir} has no evaluations: its {RECORDS} is absent or empty")
    found = [_evaluation(f"evaluation-{i}", line) for i, line in enumerate(lines.values())]
    return sorted(found, key=lambda each: not each.is_summary)


def _evaluation(anchor: str, line: ScoreLine) -> Evaluation:
    settings = dict(flat(line.get("model", {}) | line.get("sampling", {})))
    return Evaluation(
        anchor, line["cell"], settings, tuple(line.get("seeds") or ()), line.get("scores", {}), line
    )


def by_prompts(evaluations: list[Evaluation]) -> list[list[Evaluation]]:
    """Evaluations on the same prompts together."""
    groups: dict[Any, list[Evaluation]] = {}
    for each in evaluations:
        groups.setdefault(each.prompts.get("digest"), []).append(each)
    return list(groups.values())


def main_scores(group: Iterable[Evaluation]) -> list[str]:
    """Scores of all prompts, in the order of the lines."""
    return list(dict.fromkeys(name for each in group for name in each.scores if "/" not in name))


def differences(group: list[Evaluation]) -> list[str]:
    """What has to be the same for all scores to be comparable, and is not: "reference", "network clip"."""
    used: dict[str, set[str]] = {}
    for each in group:
        used_reference = each.line.get("reference_digest", each.line.get("reference"))
        named = {"reference": used_reference, "truth": each.line.get("truth")}
        named |= {f"network {name}": row for name, row in each.line.get("networks", {}).items()}
        for name, value in named.items():
            if value is not None:
                used.setdefault(name, set()).add(json.dumps(value, sort_keys=True))
    return [name for name, values in used.items() if len(values) > 1]


def varying(group: Iterable[Evaluation]) -> list[str]:
    """The settings that differ between evaluations, each of those that have it."""
    values: dict[str, set[str]] = {}
    for each in group:
        for name, value in each.shown.items():
            values.setdefault(name, set()).add(json.dumps(value))
    return [name for name, found in values.items() if len(found) > 1]


def best_of(group: Sequence[Evaluation], name: str) -> Evaluation | None:
    """The evaluation whose score is best, if its interval does not overlap that of the next best."""
    sign = -1 if name in LOWER_IS_BETTER else 1
    scored = [each for each in contenders(group) if name in each.scores]
    known = [each for each in scored if not math.isnan(each.scores[name].value)]
    ranked = sorted(known, key=lambda each: -sign * each.scores[name].value)
    if len(ranked) < 2:
        return None
    first, second = (each.scores[name] for each in ranked[:2])
    apart = first.low > second.high if sign > 0 else first.high < second.low
    return ranked[0] if apart else None


def contenders(group: Sequence[Evaluation]) -> list[Evaluation]:
    """Those whose seeds are not all in another one with the same settings."""
    return [each for each in group if not any(_covers(other, each) for other in group)]


def _covers(other: Evaluation, each: Evaluation) -> bool:
    """A mean over seeds covers these, and one over runs the same evaluation of its own run."""
    if each.settings != other.settings or each.line.get("over"):
        return False
    more = set(each.seeds) < set(other.seeds)
    return more or (bool(other.line.get("over")) and each.seeds == other.seeds)
