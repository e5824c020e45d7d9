"""Rows of the metadata files of a folder, in CSV or JSON lines."""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from ldm_jax.data.sources import Skip
from ldm_jax.data.text import numbered_lines

# Names of columns, of which several may be alike, with their values.
Row = Sequence[tuple[str | None, Any]]


def read_rows(
    text: str, path: str, columns: Sequence[str]
) -> Iterator[tuple[int, tuple[Any, ...] | Skip]]:
    """Yields the number of each row's line, and its values in `columns`; a Skip for JSON that is nested too deeply.

    A row with fewer cells than the header of a CSV has None in those that are missing.

    Raises:
      ValueError: a row that is not CSV or not an object in JSON, that has more cells than the header, or that lacks
        one of the columns or has it twice, with `path` and line.
    """
    rows = _csv_rows(text, path) if path.endswith(".csv") else _json_rows(text, path)
    for number, row in rows:
        if isinstance(row, Skip):
            yield number, row
        else:
            yield number, tuple(_cell(row, column, f"{path}:{number}") for column in columns)


def _cell(row: Row, column: str, place: str) -> Any:
    values = [value for name, value in row if name == column]
    if len(values) != 1:
        columns = ", ".join(repr(name) for name, _ in row) or "none"
        number = f"{len(values)} columns" if values else "no"
        raise ValueError(f"{place} has {number} {column!r}; it has {columns}")
    return values[0]


def _csv_rows(text: str, path: str) -> Iterator[tuple[int, Row]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        for cells in reader:
            if len(cells) > len(header):
                raise ValueError(
                    f"{path}:{reader.line_num} has {len(cells)} cells, more than the {len(header)} of its header:"
                    " put a caption that holds commas in quotation marks"
                )
            if cells:
                yield reader.line_num, list(itertools.zip_longest(header, cells))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num} is no CSV: {error}") from error


def _json_rows(text: str, path: str) -> Iterator[tuple[int, Row | Skip]]:
    for number, line in numbered_lines(text):
        try:
            row = json.loads(line, object_pairs_hook=tuple)
        except RecursionError:
            yield number, Skip("JSON nested too deeply")
            continue
        except ValueError as error:
            raise ValueError(f"{path}:{number} is no JSON: {error}") from error
        if not isinstance(row, tuple):
            raise ValueError(
                f"{path}:{number} is no JSON object with file_name and caption: {line[:40]}"
            )
        yield number, row
