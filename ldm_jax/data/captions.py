"""Which captions can be used, and which caption of an example training sees."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm_jax.data.sources import Skip
from ldm_jax.data.text import is_unicode
from ldm_jax.settings.fields import check_fields, setting

_STREAM = 0x63617074  # keeps these draws apart from others made from the same two numbers


def as_captions(value: Any, key: str) -> tuple[str, ...]:
    """The captions that a field of an item's metadata holds: one, a list, or nothing.

    Raises:
      Skip: if it holds anything else.
    """
    if value is None or isinstance(value, str):
        return (value,) if value else ()
    if isinstance(value, list) and all(isinstance(caption, str) for caption in value):
        return tuple(value)
    raise Skip("caption is no text", key)


def check_captions(captions: Sequence[str], limit: int = 4000) -> tuple[str, ...]:
    """The captions without white space around them.

    Raises:
      Skip: if there is none, or one that is blank, longer than `limit` characters, has a NUL, or was not UTF-8.
    """
    if not captions:
        raise Skip("no caption")
    for caption in captions:
        if len(caption) > limit:
            raise Skip(f"caption longer than {limit} characters")
        if "\0" in caption:
            raise Skip("NUL in caption")
        if not caption.strip():
            raise Skip("empty caption")
        if not is_unicode(caption):
            raise Skip("caption is not UTF-8")
    return tuple(caption.strip() for caption in captions)


@dataclasses.dataclass(frozen=True)
class CaptionPolicy:
    """The draw of a caption, a function of (seed, position) alone.

    With probability `dropout` the example gets the empty caption, from which classifier-free guidance learns
    the unconditional model (arXiv 2207.12598). Otherwise with probability `alternatives` it gets one of its
    alternative captions, all equally likely, and else its main one (arXiv 2404.02883, section 4: 0.5).

    Attributes:
      dropout: share of examples without a caption.
      alternatives: share of the others that use an alternative caption, where they have one.
    """

    dropout: float = setting(0.1, within="[0, 1]")
    alternatives: float = setting(0.5, within="[0, 1]")

    def __post_init__(self) -> None:
        check_fields(self)

    def choose(self, count: int, seed: int, position: int) -> int | None:
        """Which of `count` captions the example at `position` of the data order gets; None is the empty one."""
        counter = np.random.Philox(key=[seed, position], counter=[0, 0, 0, _STREAM])
        dropped, other, which = np.random.Generator(counter).random(3)
        if dropped < self.dropout:
            return None
        if count == 1 or other >= self.alternatives:
            return 0
        return 1 + int(which * (count - 1))
