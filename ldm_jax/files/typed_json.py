"""JSON as this program writes and reads it: strict text, and values of declared types.

JSON has no number that is infinite or NaN. Such floats are written as the strings "Infinity", "-Infinity" and "NaN", as
Protocol Buffers' JSON mapping does, and become floats again wherever the declared type is float.
"""

import collections.abc
import dataclasses
import json
import math
import types
import typing
from typing import Any, TypeVar

from etils import epath

T = TypeVar("T")

NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def write_json(value: Any, **options: Any) -> str:
    """Returns strict JSON, which every reader of JSON reads; `options` are those of `json.dumps`."""
    return json.dumps(_strict(value), allow_nan=False, **options)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, collections.abc.Mapping):
        return {name: _strict(item) for name, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value


def read_json(path: epath.PathLike, kind: type[T] | types.GenericAlias) -> T:
    """Reads a JSON file as an instance of `kind`, as `convert` does.

    Raises:
      ValueError: if the file is not JSON or a value in it is of another type; it names the file and the value.
      FileNotFoundError: if there is no file.
    """
    try:
        return convert(json.loads(epath.Path(path).read_bytes()), kind)
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def damaged(place: epath.PathLike, error: Exception) -> ValueError:
    """Makes the error for a file, or a line of one, that is not what this program writes."""
    return ValueError(f"{place} is damaged, or not a file of this program: {error}")


def convert(value: Any, kind: Any, where: str = "") -> Any:
    """Returns a value of `json.loads` as an instance of `kind`.

    `kind` is a dataclass (all fields known), a TypedDict (other fields are kept as they are), a NamedTuple (a list of
    its fields, where null stands for NaN), a container of such, `X | None`, or a plain type.

    Raises:
      ValueError: if a value is of another type; it says where.
    """
    origin, members = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else convert(value, members[0], where)
    if isinstance(value, dict) and (dataclasses.is_dataclass(kind) or typing.is_typeddict(kind)):
        return _convert_fields(value, kind, where)
    if isinstance(value, list) and hasattr(kind, "_fields") and len(value) == len(kind._fields):
        hints = typing.get_type_hints(kind)
        known = {name: math.nan if x is None else x for name, x in zip(hints, value, strict=True)}
        return kind(*(convert(x, hints[name], f"{where}.{name}") for name, x in known.items()))
    if isinstance(value, list) and origin in (tuple, list, collections.abc.Sequence):
        items = members[0] if members else Any
        made = [convert(item, items, f"{where}[{i}]") for i, item in enumerate(value)]
        return tuple(made) if origin is tuple else made
    if isinstance(value, dict) and origin in (dict, collections.abc.Mapping):
        items = members[1] if members else Any
        return {name: convert(item, items, f"{where}[{name!r}]") for name, item in value.items()}
    if kind is Any or type(value) is kind or (kind is float and type(value) is int):
        return value
    if kind is float and value in NOT_FINITE:
        return float(value)
    wanted = (
        "dict" if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind) else origin.__name__
    )
    raise ValueError(
        f"{where or 'its content'} is {str(value)[:60]!r}, and must be of type {wanted}"
    )


def _convert_fields(value: dict[str, Any], kind: Any, where: str) -> Any:
    hints, start = typing.get_type_hints(kind), where and where + "."
    for name in _required(kind):
        if name not in value:
            raise ValueError(f"{start}{name} is missing")
    unknown = [name for name in value if name not in hints]
    if unknown and dataclasses.is_dataclass(kind):
        raise ValueError(f"{start}{unknown[0]} is unknown; there are {', '.join(hints)}")
    return kind(
        **{name: convert(item, hints.get(name, Any), start + name) for name, item in value.items()}
    )


def _required(kind: Any) -> list[str]:
    if typing.is_typeddict(kind):
        return sorted(kind.__required_keys__)
    absent = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is field.default_factory is absent
    ]
