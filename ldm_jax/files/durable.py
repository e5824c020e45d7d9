"""Files that outlive whatever stops their writer: whole or absent, of one process and one set of settings."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from ldm_jax.files.buckets import in_bucket
from ldm_jax.files.typed_json import read_json, write_json

SETTINGS = "settings.json"


@contextlib.contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
    """Adds the path to an OSError that has none, as that of a full disk, which is met in writing and not in opening."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def write_atomically(path: epath.PathLike, data: bytes) -> None:
    """Writes a file that is either there in full or not at all, whenever the process or the machine dies."""
    if in_bucket(path):  # where every write is so
        epath.Path(path).write_bytes(data)
        return
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with naming(path):
        partial.write_bytes(data)
        publish(partial, path)


def publish(partial: Path, path: Path) -> None:
    """Gives a written file its name, once its bytes are on the disk."""
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def claim(directory: Path, settings: dict[str, Any]) -> None:
    """Writes the settings into a new directory, or compares them with those it was begun with.

    Raises:
      ValueError: if they differ, of which it lists the differences, or cannot be read.
    """
    path = directory / SETTINGS
    text = write_json(settings, indent=1)
    if not path.exists():
        write_atomically(path, text.encode())
        return
    before, now = (dict(_leaves(tree)) for tree in (read_json(path, dict), json.loads(text)))
    differences = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"{directory} was begun with other settings: {'; '.join(differences)}; choose another directory"
        )


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@contextlib.contextmanager
def alone_in(directory: epath.PathLike) -> Iterator[None]:
    """Holds a lock on the directory, which the system takes back however the process ends; buckets have none.

    Raises:
      ValueError: if another process holds it.
    """
    if in_bucket(directory):
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            _lock(descriptor, directory)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: epath.PathLike) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is writing to {directory}") from None


@contextlib.contextmanager
def explained_disk_errors(directory: Path) -> Iterator[None]:
    """Says in one sentence that the disk is full.

    ArrayRecord reports it as a RuntimeError with the chain of calls that met it.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if "No space left" not in str(error):
            raise
        raise OSError(
            f"no space left on the disk of {directory}: its finished shards stay, and the same command"
            " continues after them once there is room"
        ) from error
