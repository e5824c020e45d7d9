"""Evaluations on disk: one directory for each model, way to sample and seed, that outlives what stops its writer.

facts.json           what decides every feature; the directory's name ends in its digest
parts/00000064.npz   features of a batch, by its first prompt, until all are there
features.npz         features of all, in the prompts' order
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from ldm_jax.evals.features import Features, count_of, joined, read_features, write_features
from ldm_jax.files.durable import write_atomically
from ldm_jax.files.typed_json import write_json

DIRECTORY = "evaluated"  # of a run
FACTS, FEATURES = "facts.json", "features.npz"


class Cell:
    """One evaluation in a run's directory; `name` is what it is called there."""

    def __init__(self, workdir: epath.PathLike, label: str, facts: Mapping[str, Any]) -> None:
        text = write_json(facts, indent=1, sort_keys=True)
        self.facts = json.loads(text)
        self.name = f"{label}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        self.path = epath.Path(workdir) / DIRECTORY / self.name
        self._text = text

    def begin(self) -> int:
        """Makes the directory; the number of prompts whose features are there, the first ones."""
        (self.path / "parts").mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / FACTS, self._text.encode())
        count = 0
        for part in self._parts():
            if int(part.stem) != count:  # behind a gap
                part.unlink()
                continue
            count += count_of(read_features(part)[0])
        return count

    def add(self, first: int, features: Features) -> None:
        """Takes in the features of a batch whose first prompt has this number."""
        write_features(self.path / "parts" / f"{first:08d}.npz", features)

    def finish(self) -> Features:
        """Features of all prompts, once all are there."""
        if (self.path / FEATURES).exists():
            return read_features(self.path / FEATURES)[0]
        parts = self._parts()
        features = joined([read_features(part)[0] for part in parts])
        write_features(self.path / FEATURES, features, self.facts)
        (self.path / "parts").rmtree()
        return features

    @property
    def finished(self) -> bool:
        """Whether the features of all prompts are there."""
        return (self.path / FEATURES).exists()

    def _parts(self) -> list[epath.Path]:
        directory = self.path / "parts"
        found = directory.iterdir() if directory.exists() else ()
        return sorted(path for path in found if re.fullmatch(r"\d{8}\.npz", path.name))


def read_cell(path: epath.PathLike) -> tuple[Features, dict[str, Any]]:
    """The features of a finished evaluation by its directory, and its facts.

    Raises FileNotFoundError where there is none, ValueError where the file does not say what it is of.
    """
    features = epath.Path(path) / FEATURES
    if not features.exists():
        raise FileNotFoundError(
            f"{path} is no finished evaluation: it has no {FEATURES}; such are in RUN/{DIRECTORY}"
        )
    found, facts = read_features(features)
    if not isinstance(facts, dict) or not {"prompts", "noise"} <= set(facts):
        raise ValueError(
            f"{features} says nothing of its evaluation, as those of RUN/{DIRECTORY} do"
        )
    return found, facts


def check_comparable(ours: Mapping[str, Any], theirs: Mapping[str, Any], *more: str) -> None:
    """Raises ValueError for evaluations of other prompts or networks, or that do not share `more` of their facts."""
    for name in ("prompts", "networks", "truth", *more):
        mine, other = (facts.get(name) for facts in (ours, theirs))
        if name == "prompts":
            mine, other = mine["digest"], other["digest"]
        if mine != other:
            raise ValueError(f"the two evaluations are of other {name}: {mine} and {other}")
