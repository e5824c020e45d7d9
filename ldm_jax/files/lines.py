"""Files of JSON lines, which are only ever appended to."""

import contextlib
import fcntl
import json
import os
from typing import Any

from etils import epath

from ldm_jax.files.buckets import in_bucket


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
