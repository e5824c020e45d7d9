"""Sentences for a setting that there is not: what there is where the path goes wrong, and what may be meant."""

import collections
import difflib
from collections.abc import Sequence

from ldm_jax.settings.fields import no_such_key
from ldm_jax.settings.schema import settings

_NEAR = 0.75  # share of letters, in order, that two names have in common


def unknown_setting(path: str, paths: list[str]) -> str:
    """The sentence for an override that names no setting: what there is where the path goes wrong."""
    known, children = [], _children("", paths)
    for key in path.split("."):
        where = ".".join(["--config", *known])
        if not children:
            return f"{where} is one setting; there is no {key!r} in it"
        if key not in children:
            return no_such_key(where, key, children) + _elsewhere(path, paths, children)
        known.append(key)
        children = _children(".".join(known) + ".", paths)
    return f"--config.{path} is a section; give one of its settings: {', '.join(children)}"


def _elsewhere(path: str, paths: list[str], tried: Sequence[str] = ()) -> str:
    """Settings of other sections that may be meant: those of the same name, or else of a name that is near."""
    name, by_name = path.rpartition(".")[2], collections.defaultdict(list)
    for other in paths:
        by_name[other.rpartition(".")[2]].append(other)
    here = difflib.get_close_matches(name, tried)
    near = [] if here else difflib.get_close_matches(name, by_name, cutoff=_NEAR)
    found = by_name.get(name) or [other for key in near for other in by_name[key]]
    if len(found) > 3:
        found = difflib.get_close_matches(path, found, cutoff=0)
    return f"; there is {' and '.join(f'--config.{other}' for other in found)}" if found else ""


def same_name(flag: str, cls: type | None) -> str:
    """The end of a sentence about an unknown flag: the settings that are called as it is."""
    name = flag.lstrip("-").partition("=")[0]
    paths = [setting.path for setting in settings(cls)] if cls else []
    return _elsewhere(name, [path for path in paths if path.rpartition(".")[2] == name])


def _children(prefix: str, paths: list[str]) -> list[str]:
    below = (path.removeprefix(prefix) for path in paths if path.startswith(prefix))
    return list(dict.fromkeys(path.partition(".")[0] for path in below))
