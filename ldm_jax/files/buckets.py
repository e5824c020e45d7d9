"""Paths in object stores."""

import os

from etils import epath


def in_bucket(path: epath.PathLike) -> bool:
    """Whether a path is of an object store, as gs://BUCKET/RUN is, where each file is written at once or not at all."""
    return "://" in os.fspath(path)
