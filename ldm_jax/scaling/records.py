"""The ledger of experiments: one run, or one cell of a study's grid, a JSON line.

A ledger is only ever appended to. What was repeated (the same `key`) has several lines, and the last one counts.
"""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from etils import epath

from ldm_jax.types import Estimate


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run was, what it cost, and what came of it."""

    study: str  # the question that it belongs to
    config: Mapping[str, Any]  # as its config.json has it
    commit: str  # of the code; empty where unknown
    chips: str  # kind and number, as "TPU v5p x 8"
    seed: int
    params: int  # of the trained network
    flops: float  # of the training, in all
    examples: int  # seen in training
    seconds: float  # of the training, waiting included
    losses: Mapping[str, float]  # the last training loss, and those of validation
    scores: Mapping[str, Estimate]

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What makes two records the same run."""
        return self.study, json.dumps(self.config, sort_keys=True), self.seed, self.examples


@dataclasses.dataclass(frozen=True)
class SamplingRecord:
    """Images of one model drawn in one way with one seed: a cell of a study's grid, and what came of it."""

    study: str
    grid: str  # digest of all that decides the cells of the study
    commit: str  # of the code that drew; empty where unknown
    chips: str  # kind and number
    model: str  # its name in the study
    params: int
    examples: int  # seen in training
    sampler: str
    steps: int
    guidance: float
    seed: int
    cost: float  # evaluations of the network for an image, a pair counting once, times the cost of one
    flops: float  # of the network for an image, of both branches of guidance
    seconds: float | None  # for an image, looked at too, on all chips; None: compiling was in it
    scores: Mapping[str, Estimate]
    values: Mapping[str, Sequence[float]]  # numbers by prompt, whose mean is the score of that name
    cells: int = 0  # of the whole grid; 0: not known

    @property
    def group(self) -> tuple[str, str, str]:
        """What has to be alike in records that stand in one figure."""
        return self.study, self.grid, self.commit

    @property
    def place(self) -> tuple[str, str, int, float, int]:
        """The cell within its grid."""
        return self.model, self.sampler, self.steps, self.guidance, self.seed

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two records the same cell."""
        return self.group, self.place


Record = TypeVar("Record", RunRecord, SamplingRecord)


def commit() -> str:
    """The commit that the package is run from, "-dirty" behind it if files were changed; "" where it is no checkout."""
    of = ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "-C", os.path.dirname(__file__), "describe", *of]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def append_record(path: epath.PathLike, record: RunRecord | SamplingRecord) -> None:
    """Adds a record to a ledger as one line, as `append_line` does."""
    append_line(path, dataclasses.asdict(record))


def append_line(path: epath.PathLike, entry: Any) -> None:
    """Adds an object to a file as one line of JSON, which is on disk when this returns.

    Lines of several processes do not mix: the file is locked for the write. What a killed writer
    left unfinished at the end is closed by a line break, so that it spoils no other line. A bucket
    has no locks, and no file in it grows: there the file is written anew, by one process only.
    """
    line = json.dumps(entry).encode() + b"\n"
    if in_bucket(path):
        _append_anew(epath.Path(path), line)
    else:
        _append_locked(path, line)


def read_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """The objects that `append_line` has added, none where there is no file, without what was left unfinished."""
    try:  # not `exists`, which takes a bucket that does not answer for an absent file
        lines = epath.Path(path).read_text().split("\n")
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def in_bucket(path: epath.PathLike) -> bool:
    """Whether a path is of an object store, as gs://BUCKET/RUN is, where each file is written at once or not at all."""
    return "://" in os.fspath(path)


def _append_anew(path: epath.Path, line: bytes) -> None:
    try:  # not `exists`, which takes a bucket that does not answer for an absent file
        before = path.read_bytes()
    except FileNotFoundError:
        before = b""
    torn = before and not before.endswith(b"\n")
    path.write_bytes(before + (b"\n" if torn else b"") + line)


def _append_locked(path: epath.PathLike, line: bytes) -> None:
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        os.write(file, b"\n" + line if torn else line)
        os.fsync(file)
    finally:
        os.close(file)


def read_records(kind: type[Record], *paths: epath.PathLike) -> list[Record]:
    """The records of one ledger or of several, each `key` once, in the order of first appearance.

    A line that was left unfinished is left out with a warning.

    Raises:
      ValueError: a line that is JSON but no record, with its file and number.
    """
    records = (record for path in paths for record in _read(kind, epath.Path(path)))
    return list({record.key: record for record in records}.values())


def _read(kind: type[Record], path: epath.Path) -> Iterator[Record]:
    for number, line in enumerate(io.StringIO(path.read_text()), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            warnings.warn(f"{path}, line {number}: unfinished, left out", stacklevel=3)
        else:
            yield _record(kind, entry, f"{path}, line {number}")


def _record(kind: type[Record], entry: Any, place: str) -> Record:
    fields = dataclasses.fields(kind)
    expected = {field.name for field in fields}
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    if not isinstance(entry, dict) or not needed <= set(entry) <= expected:
        raise ValueError(f"{place} is no record; one has {', '.join(sorted(expected))}")
    scores = {name: Estimate(*row) for name, row in entry["scores"].items()}
    return kind(**entry | {"scores": scores})
