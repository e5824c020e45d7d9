"""JSON files beside pretrained networks. Their fields are read by type, so that no other value reaches a network."""

import contextlib
import dataclasses
import json
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm_jax.settings.schema import conform, no_such_key

COMPUTED = (
    "dtype",
    "remat",
)  # fields of a network's config that say how it is computed, not what it is
LIMIT = 2**31

Fields = Mapping[
    str, tuple[Any, Any]
]  # the type of each field, and its value where a file is silent


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises ValueError for a file that is not JSON, or that holds a list, a number or another value.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        kind = "null" if content is None else type(content).__name__
        raise ValueError(f"{path} holds {kind}; it must be an object, {{...}}")
    return content


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Puts the name of the file that is read at the start of a ValueError's sentence."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def fields_of(config: type) -> dict[str, tuple[Any, Any]]:
    """Returns the type and the default of each field of a network's config, without those of its computation."""
    kinds = typing.get_type_hints(config)
    fields = (field for field in dataclasses.fields(config) if field.name not in COMPUTED)
    return {field.name: (kinds[field.name], field.default) for field in fields}


def typed(values: Mapping[str, Any], fields: Fields, free: Collection[str] = ()) -> dict[str, Any]:
    """Returns the value of every field, conformed to its type; the other values do not count.

    Raises ValueError for a value of another type. It is also raised for an empty list, and for a number that is not
    positive, is not finite or is too large to count anything, unless the field is named in `free`.
    """
    result = {}
    for name, (kind, default) in fields.items():
        result[name] = conform(values[name], kind, name) if name in values else default
        if name in values and name not in free:
            _check_range(result[name], name)
    return result


def check_known(values: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raises ValueError for a name that is not among the known ones."""
    for name in values:
        if name not in known:
            raise ValueError(no_such_key(where, name, known))


def _check_range(value: Any, name: str) -> None:
    if value == ():
        raise ValueError(f"{name} is empty; it takes at least one value")
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            _check_range(item, f"{name}[{i}]")
    elif isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < LIMIT:
        raise ValueError(f"{name} is {value!r}; it must be above 0 and below {LIMIT}")
