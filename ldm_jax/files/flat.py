"""Nested settings, one by one."""

from collections.abc import Iterator, Mapping
from typing import Any


def flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings one by one: `("sampler.ddim.eta", 0.0)`."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
