"""The ledger of experiments: a JSON line a record, of whatever dataclass it is.

A ledger is only ever appended to. What was repeated (the same `key`) has several lines, and the last one counts.
"""

import dataclasses
import os
import subprocess
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

from etils import epath

from ldm_jax.files.lines import append_line, numbered_lines
from ldm_jax.files.typed_json import convert

Record = TypeVar(
    "Record"
)  # a dataclass with `scores` by name, and `key`, which says whether two are the same


def commit() -> str:
    """The commit that the package is run from, "-dirty" behind it if files were changed; "" where it is no checkout."""
    of = ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "-C", os.path.dirname(__file__), "describe", *of]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def append_record(path: epath.PathLike, record: Any) -> None:
    """Adds a record to a ledger as one line, as `append_line` does."""
    append_line(path, dataclasses.asdict(record))


def read_records(kind: type[Record], *paths: epath.PathLike) -> list[Record]:
    """The records of one ledger or of several, each `key` once, in the order of first appearance.

    A line that was left unfinished is left out with a warning.

    Raises:
      ValueError: a line that is no record, with its file and number.
      FileNotFoundError: there is no such ledger.
    """
    records = (record for path in paths for record in _read(kind, epath.Path(path)))
    return list({record.key: record for record in records}.values())


def _read(kind: type[Record], path: epath.Path) -> Iterator[Record]:
    for place, entry in numbered_lines(path, dict):
        if entry is None:
            warnings.warn(f"{place}: unfinished, left out", stacklevel=3)
        else:
            yield _record(kind, entry, place)


def _record(kind: type[Record], entry: dict[str, Any], place: str) -> Record:
    try:
        return convert(entry, kind)
    except ValueError as error:
        expected = ", ".join(sorted(field.name for field in dataclasses.fields(kind)))
        raise ValueError(f"{place} is no record; one has {expected}: {error}") from error
