"""Values of settings as people type them: a text and a type in, a value of that type out."""

import ast
import decimal
import math
import types
import typing
from typing import Any

from ldm_jax.settings.ranges import check_number, shown
from ldm_jax.settings.schema import conform, kind_name

TRUTH = dict.fromkeys(("true", "yes", "on", "1"), True)
TRUTH |= dict.fromkeys(("false", "no", "off", "0"), False)
ABSENT = ("", "none")  # of a setting that may be None, and of a tuple without values
_DIGITS = 20  # of a whole number that is written with an exponent


def read_value(text: str, kind: Any, path: str) -> Any:
    """The value of a type that a text stands for.

    Raises:
      ValueError: it stands for none; the sentence begins with the path.
    """
    try:
        return _read(text, kind)
    except OverflowError:
        check_number(math.inf, "(-inf, inf)", f"{path} is {shown(text)}, which")
    except ValueError:
        raise ValueError(f"{path} is {shown(text)}; it takes {kind_name(kind)}") from None


def _read(text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        return _tuple(text.strip(), kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return _first_of(text, typing.get_args(kind))
    return text if kind is str else _READERS[kind](text.strip().lower())


def _first_of(text: str, kinds: tuple[Any, ...]) -> Any:
    for kind in sorted(kinds, key=lambda kind: kind is not types.NoneType):
        try:
            return _read(text, kind)
        except ValueError:
            continue
    raise ValueError


def _tuple(text: str, kind: Any) -> Any:
    if text.lower() in ABSENT:
        return conform((), kind, "")
    try:
        return conform(ast.literal_eval(text), kind, "")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass  # as most texts are, and numbers that Python's literals do not have
    inside = text[1:-1] if text[0] + text[-1] in ("()", "[]") else text
    parts = [part.strip() for part in inside.removesuffix(",").split(",")]
    members = typing.get_args(kind)
    members = members[:1] * len(parts) if members[-1] is Ellipsis else members
    return tuple(_read(part, member) for part, member in zip(parts, members, strict=True))


def _none(text: str) -> None:
    if text not in ABSENT:
        raise ValueError


def _bool(text: str) -> bool:
    if text not in TRUTH:
        raise ValueError
    return TRUTH[text]


def _int(text: str) -> int:
    """Also `1e6`, where that is exact."""
    try:
        return int(text, 0)
    except ValueError:
        pass
    try:
        number = decimal.Decimal(text)
    except decimal.InvalidOperation:
        raise ValueError from None
    if not number.is_finite() or number.adjusted() > _DIGITS or number != int(number):
        raise ValueError
    return int(number)


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number) and "inf" not in text:
        raise OverflowError  # which is not what was typed
    return number


_READERS = {types.NoneType: _none, bool: _bool, int: _int, float: _float}
