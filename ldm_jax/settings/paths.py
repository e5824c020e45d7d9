"""Paths as people write them: `~` is the home directory, and a relative one means the directory that one stands in."""

import os


def home_path(text: str) -> str:
    """The path with `~` as the home directory.

    Raises:
      ValueError: it begins with the home of a user that there is not.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(
            f"{text!r} begins with a user that has no home directory here; write ./{text} for a name"
        )
    return path


def absolute_path(text: str) -> str:
    """The path as it is from any directory; gs://BUCKET/PATH as it is. Raises ValueError as `home_path`."""
    if not text:
        raise ValueError("a path is empty; . is the directory that one stands in")
    return text if "://" in text else os.path.abspath(home_path(text))
