"""JSON files that are read as dataclasses: a file that holds something else is refused in one sentence."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read_json(path: Path, kind: type[T]) -> T:
    """Reads a JSON file as an instance of `kind`: a dataclass, whose fields may be dataclasses too, or dict.

    Raises:
      ValueError: if the file is not JSON or a value in it is of another type; it names the file and the value.
      FileNotFoundError: if there is no file.
    """
    try:
        return _convert(json.loads(path.read_bytes()), kind, "")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or not a file of this program: {error}") from error


def _convert(value: Any, kind: Any, where: str) -> Any:
    origin, members = typing.get_origin(kind) or kind, typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _convert_fields(value, kind, where)
    if origin in (tuple, list) and isinstance(value, list):
        return origin(_convert(item, members[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        items = members[1] if members else Any
        return {name: _convert(item, items, f"{where}[{name!r}]") for name, item in value.items()}
    if kind is Any or type(value) is kind or (kind is float and type(value) is int):
        return value
    wanted = "dict" if dataclasses.is_dataclass(kind) else origin.__name__
    raise ValueError(
        f"{where or 'its content'} is {str(value)[:60]!r}, and must be of type {wanted}"
    )


def _convert_fields(value: dict[str, Any], kind: Any, where: str) -> Any:
    hints, start = typing.get_type_hints(kind), where and where + "."
    for field in dataclasses.fields(kind):
        absent = field.default is field.default_factory is dataclasses.MISSING
        if absent and field.name not in value:
            raise ValueError(f"{start}{field.name} is missing")
    for name in value:
        if name not in hints:
            raise ValueError(f"{start}{name} is unknown; there are {', '.join(hints)}")
    return kind(**{name: _convert(item, hints[name], start + name) for name, item in value.items()})
