"""Files of JSON lines, which are only ever appended to."""

import fcntl
import json
import os
from collections.abc import Iterator
from typing import Any, TypeVar

from etils import epath

from ldm_jax.files.buckets import in_bucket
from ldm_jax.files.durable import naming
from ldm_jax.files.typed_json import convert, damaged, write_json

T = TypeVar("T")


def append_line(path: epath.PathLike, entry: Any) -> None:
    """Adds an object to a file as one line of strict JSON, which is on disk when this returns.

    Lines of several processes do not mix: the file is locked for the write. What a killed writer
    left unfinished at the end is closed by a line break, so that it spoils no other line. A bucket
    has no locks, and no file in it grows: there the file is written anew, by one process only.
    """
    line = write_json(entry).encode() + b"\n"
    with naming(path):
        if in_bucket(path):
            _append_anew(epath.Path(path), line)
        else:
            _append_locked(path, line)


def read_lines(path: epath.PathLike, kind: type[T] = dict) -> list[T]:
    """The objects that `append_line` has added, none where there is no file, without what was left unfinished.

    Raises:
      ValueError: a line is not UTF-8, or JSON that is no `kind`; it names the file and the line.
    """
    try:  # not `exists`, which takes a bucket that does not answer for an absent file
        return [line for _, line in numbered_lines(path, kind) if line is not None]
    except FileNotFoundError:
        return []


def numbered_lines(path: epath.PathLike, kind: type[T]) -> Iterator[tuple[str, T | None]]:
    """Yields every line with its place; None is one that was left unfinished. Raises as `read_lines`."""
    for number, line in enumerate(epath.Path(path).read_bytes().splitlines(), 1):
        place = f"{path}, line {number}"
        try:
            yield place, convert(json.loads(line.decode()), kind)
        except json.JSONDecodeError:
            yield place, None
        except (ValueError, RecursionError) as error:
            raise damaged(place, error) from error


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
        rest = b"\n" + line if torn else line
        while rest:  # a disk that fills takes a part, and refuses the next
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)
