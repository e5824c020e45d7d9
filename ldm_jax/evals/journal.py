"""What evaluations leave behind in a run's directory, for its report.

prompts.json          the prompts, in order, and the group that each belongs to
references.json       scores of what a model is measured against: {"untrained": {...}, "true renders": {...}}
evaluations.jsonl     one line an evaluation; after a resume the last line of a count of examples holds
samples/*.png         the first images of each, side by side
"""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from etils import epath

from ldm_jax.evals.image_grids import save_grid
from ldm_jax.evals.prompts import Prompts
from ldm_jax.files.durable import write_atomically
from ldm_jax.files.lines import append_line, read_lines
from ldm_jax.files.typed_json import write_json
from ldm_jax.types import Estimate, Pixels

COLUMNS = 8  # of a picture of samples


class EvaluationLine(TypedDict):
    """A line of evaluations.jsonl."""

    examples: int
    weights: NotRequired[str]
    scores: NotRequired[dict[str, Estimate]]
    validation: NotRequired[dict[str, float]]
    samples: NotRequired[str]


class Prompt(TypedDict):
    """A row of prompts.json."""

    prompt: str
    group: NotRequired[str]


class Journal:
    """The evaluations of one run; `shown` images of each are kept, and every line says `described`."""

    def __init__(
        self, directory: epath.PathLike, shown: int, described: Mapping[str, str] | None = None
    ) -> None:
        self._directory, self._shown = epath.Path(directory), shown
        self._described = dict(described or {})
        (self._directory / "samples").mkdir(parents=True, exist_ok=True)

    def has(self, examples: int) -> bool:
        """Whether an evaluation after so many examples is written down."""
        lines = read_lines(self._directory / "evaluations.jsonl", EvaluationLine)
        return any(line["examples"] == examples for line in lines)

    def prompts(self, prompts: Prompts) -> None:
        """Writes down what is evaluated on."""
        rows = [
            {"prompt": text, "group": group}
            for text, group in zip(prompts.texts, prompts.groups, strict=True)
        ]
        self._write("prompts.json", rows)

    def references(self, scores: Mapping[str, Mapping[str, Estimate]]) -> None:
        """Writes down the scores of what a model is measured against."""
        self._write("references.json", scores)

    def add(
        self,
        examples: int,
        weights: str,
        images: Pixels,
        scores: Mapping[str, Estimate],
        validation: Mapping[str, float],
    ) -> None:
        """Writes down one evaluation: the picture first, so that a line's picture is there."""
        picture = f"samples/{examples:012d}.png"
        self.picture(picture, images)
        line = {
            "examples": examples,
            "weights": weights,
            "scores": scores,
            "validation": validation,
            "samples": picture,
            **self._described,
        }
        append_line(self._directory / "evaluations.jsonl", line)

    def picture(self, name: str, images: Pixels) -> None:
        """Writes the first images side by side."""
        save_grid(self._directory / name, images[: self._shown], COLUMNS)

    def _write(self, name: str, content: Any) -> None:
        write_atomically(self._directory / name, write_json(content, indent=1).encode())
