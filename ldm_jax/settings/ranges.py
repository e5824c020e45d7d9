"""Ranges of numbers in interval notation: `[0, 1)`, `(0, inf]`, `-1 or [1, inf)`.

A bracket includes the end beside it, a parenthesis does not. Infinity is a value only where a bracket includes it;
everything else has to fit into float32, in which all is computed. NaN is in no range.
"""

import dataclasses
import functools
import math
import numbers
import re
from typing import Any

FLOAT32 = 3.4028234663852886e38  # the largest number that it holds
FINITE = "(-inf, inf)"
SEEDS = (
    "[0, 4294967295]"  # what a key of JAX tells apart; others would be one of these without a word
)

_INTERVAL = re.compile(r"([\[(])([^,\s]+), ([^,\s]+)([\])])")
_SHOWN = 100  # characters of a value in a sentence


@dataclasses.dataclass(frozen=True)
class Interval:
    """The numbers between two ends."""

    low: int | float
    high: int | float
    low_included: bool = True
    high_included: bool = True

    def __contains__(self, number: int | float) -> bool:
        if number == self.low or number == self.high:
            return self.low_included if number == self.low else self.high_included
        return self.low < number < self.high and abs(number) <= FLOAT32

    def __str__(self) -> str:
        finite = [end for end in (self.low, self.high) if abs(end) <= FLOAT32]
        if len(finite) == 2 and self.low_included and self.high_included:
            return str(self.low) if self.low == self.high else f"from {self.low} to {self.high}"
        low = f"{'at least' if self.low_included else 'above'} {self.low}"
        high = f"{'at most' if self.high_included else 'below'} {self.high}"
        words = " and ".join([low] * (self.low in finite) + [high] * (self.high in finite))
        return (words or "finite") + (
            ", or inf" if self.high == math.inf and self.high_included else ""
        )


@functools.cache
def intervals(text: str) -> tuple[Interval, ...]:
    """The parts of a range, of which a number has to be in one.

    Raises:
      ValueError: the text is no interval notation.
    """
    return tuple(_interval(part) for part in text.split(" or "))


def _interval(text: str) -> Interval:
    if found := _INTERVAL.fullmatch(text):
        left, low, high, right = found.groups()
        return Interval(_number(low), _number(high), left == "[", right == "]")
    return Interval(_number(text), _number(text))


def _number(text: str) -> int | float:
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def words(text: str) -> str:
    """A range as help and errors say it: `at least 0 and below 1`."""
    return " or ".join(map(str, intervals(text)))


def check_number(number: Any, text: str, what: str) -> None:
    """Raises ValueError for a number outside of a range; the sentence says `what` it is and what is allowed."""
    allowed = words(text)
    if not isinstance(number, numbers.Real):
        raise ValueError(f"{what} is {shown(number)}; it is a number, {allowed}")
    if any(number in part for part in intervals(text)):
        return
    if abs(number) > FLOAT32:
        allowed += f", and no larger than float32 holds ({FLOAT32:.1e})"
    raise ValueError(f"{what} is {shown(number)}; it is {allowed}")


def check_seed(seed: int, what: str) -> int:
    """The seed, if it is one that no other is the same as. Raises ValueError as `check_number`."""
    check_number(seed, SEEDS, what)
    return seed


def shown(value: object) -> str:
    """A value as a sentence shows it: whole where it is short."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of more digits than Python writes"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}... ({len(text)} characters)"
