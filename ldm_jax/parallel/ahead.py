"""Work given to devices ahead of what the host does with the work before."""

import collections
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def one_ahead(values: Iterable[T]) -> Iterator[T]:
    """The same values, each given only after the next one was asked for: devices work on that meanwhile."""
    held: collections.deque[T] = collections.deque()
    for value in values:
        held.append(value)
        if len(held) > 1:
            yield held.popleft()
    yield from held
