"""What a field of a config states of itself, and the check of it.

It stands in the field's metadata: the `range` of its numbers (`ldm_jax.settings.ranges`), the `count` of a tuple's
values, its `names`, how a `path` is made absolute, and what the setting `decides`. `setting`, `choice` and `one_of`
write it; a module that may not import this one writes the same keys. A class is held to it by `check_fields` in its
`__post_init__`, and a section states what its settings decide unless they say so themselves.
"""

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from ldm_jax.settings.ranges import FINITE, check_number, shown

# What a setting may decide: training's result; what is drawn with given parameters; what is measured on given images.
PARAMETERS, IMAGES, SCORES = "parameters", "images", "scores"
NOTHING = ()


def setting(
    default: Any,
    *,
    within: str | None = None,
    count: str | None = None,
    names: Collection[str] | None = None,
    decides: str | Collection[str] | None = None,
    path: Callable[[str], str] | None = None,
    registry: Mapping[str, type] | None = None,
) -> Any:
    """A field of a config.

    Args:
      default: its value where none is given.
      within: the range of its numbers, in interval notation; of a float without one: finite.
      count: the range of the number of a tuple's values.
      names: the names that it, or each value of a tuple, is one of.
      decides: of PARAMETERS, IMAGES and SCORES those that depend on it, or NOTHING; by default what its section says.
      path: for a field that names files: makes the text absolute.
      registry: as `choice`.
    """
    decided = (decides,) if isinstance(decides, str) else decides
    known = {"range": within, "count": count, "names": names, "decides": decided}
    known |= {"path": path, "registry": registry}
    metadata = {key: value for key, value in known.items() if value is not None}
    return dataclasses.field(default=default, metadata=metadata)


def choice(registry: Mapping[str, type], default: Any, **known: Any) -> Any:
    """A field that holds an instance of one of the registry's classes, which all have defaults."""
    return setting(default, registry=registry, **known)


def one_of(names: Collection[str], default: Any, **known: Any) -> Any:
    """A field that holds one of a few names, or a tuple of them: a registry's, or those of a plain tuple."""
    return setting(default, names=names, **known)


def check_fields(config: Any) -> None:
    """Holds a dataclass to the ranges, counts and names that its fields state.

    Raises:
      ValueError: a value is outside of them; with its name and what is allowed.
    """
    for field in dataclasses.fields(config):
        where = f"{type(config).__name__}.{field.name}"
        check_value(getattr(config, field.name), field.metadata, where)


def check_value(value: Any, metadata: Mapping[str, Any], path: str) -> None:
    """Raises ValueError for a value outside of what a field's metadata state; the sentence begins with the path."""
    if isinstance(value, tuple | list):
        if "count" in metadata:
            what = f"{path} is {shown(value)}; its number of values"
            check_number(len(value), metadata["count"], what)
        for i, item in enumerate(value):
            check_value(item, {**metadata, "count": FINITE}, f"{path}[{i}]")
    elif value is not None and (names := metadata.get("names")) is not None:
        check_name(value, names, path)
    elif isinstance(value, float) or ("range" in metadata and value is not None):
        check_number(value, metadata.get("range", FINITE), path)


def no_such_key(path: str, key: str, present: Iterable[str]) -> str:
    """The sentence for a key that is not there: where, the nearest match, and what there is."""
    present = list(present)
    return f"{path} has no {key!r}{_nearest(key, present)}; it has {', '.join(present)}"


def check_name(value: Any, names: Collection[str], path: str) -> str:
    """The value, if it is one of the names.

    Raises:
      ValueError: it is not; the sentence lists the names.
    """
    if isinstance(value, str) and value in names:
        return value
    raise ValueError(
        f"{path} is {shown(value)}{_nearest(value, names)}; allowed are {', '.join(names)}"
    )


def _nearest(key: Any, present: Collection[str]) -> str:
    matches = difflib.get_close_matches(str(key), list(present))
    if not matches:
        return ""
    # Slips are rare at the start of a name: "dpm++" is nearer to "dpmpp" than to "ddpm".
    nearest = max(matches, key=lambda match: _shared_start(match, str(key)))
    return f" (did you mean {nearest!r}?)"


def _shared_start(first: str, second: str) -> int:
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
