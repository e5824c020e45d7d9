"""Frozen dataclasses as the config of a run: to `ConfigDict` and back, and to JSON and back.

A component that holds no arrays is its own config: a frozen dataclass whose fields are numbers,
strings, booleans, tuples of these, what may be None (`int | None`), other such dataclasses, or a
`choice` among a registry's classes. A field's line of help is the comment beside or above it, or
what the class's docstring says of it.

    >>> import dataclasses
    >>> from ldm_jax.diffusion import DDIM, PREDICTIONS, DPMpp, Sampler
    >>> from ldm_jax.settings.fields import IMAGES, choice, one_of, setting
    >>> @dataclasses.dataclass(frozen=True)
    ... class Run:
    ...     sampler: Sampler = choice({"ddim": DDIM, "dpmpp": DPMpp}, DDIM())  # the rule of a step
    ...     prediction: str = one_of(PREDICTIONS, "v")  # what the network predicts
    ...     steps: int = setting(50, within="[1, inf)", decides=IMAGES)  # sampling steps
    >>> config = to_config_dict(Run())  # ml_collections: locked, dotted
    >>> config.sampler.name = "dpmpp"  # a section for each row; only the named one counts
    >>> config.sampler.dpmpp.order = 1
    >>> from_config_dict(config, Run).sampler
    DPMpp(order=1, solver='midpoint', lower_order_final=True)
    >>> config.steps = 0
    >>> from_config_dict(config, Run)
    Traceback (most recent call last):
        ...
    ValueError: config.steps is 0; it is at least 1
"""

import ast
import dataclasses
import functools
import inspect
import io
import json
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from ml_collections import config_dict

from ldm_jax.settings.fields import check_name, check_value, no_such_key
from ldm_jax.settings.ranges import FINITE, check_number, shown, words

CONFIG_FILE = "config.json"  # what a run's directory keeps its config in

Config = TypeVar("Config")
Section = config_dict.ConfigDict | Mapping


class Setting(NamedTuple):
    """A leaf of a config: dotted path, type, line of help, names that it is limited to, and what is known of it.

    `decides` is None where neither the field nor a section around it says so.
    """

    path: str
    kind: Any
    help: str
    names: tuple[str, ...] | None
    decides: frozenset[str] | None = None
    metadata: Mapping[str, Any] = types.MappingProxyType({})

    @property
    def allowed(self) -> str:
        """Its values in words: the names, or the type with its range."""
        parts = [" | ".join(self.names)] if self.names else [kind_name(self.kind)]
        parts += [words(self.metadata["range"])] if "range" in self.metadata else []
        parts += [f"{words(self.metadata['count'])} of them"] if "count" in self.metadata else []
        return ", ".join(parts)


class Difference(NamedTuple):
    """A leaf in which two configs differ; a side that lacks it reads `absent`."""

    path: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.path}: {self.old} -> {self.new}"


def settings(
    cls: type, path: str = "", decides: Collection[str] | None = None
) -> Iterator[Setting]:
    """Every leaf that a config of the class has, in the order of its fields; `decides` is what its section states."""
    for field, kind in _typed_fields(cls):
        here, text = _join(path, field.name), _help(cls, field.name)
        own = field.metadata.get("decides", decides)
        decided = None if own is None else frozenset(own)
        if registry := field.metadata.get("registry"):
            yield Setting(f"{here}.name", str, text, tuple(registry), decided)
            for name, row in registry.items():
                yield from settings(row, f"{here}.{name}", own)
        elif dataclasses.is_dataclass(kind):
            yield from settings(kind, here, own)
        else:
            names = field.metadata.get("names")
            known = decided, field.metadata
            yield Setting(here, kind, text, tuple(names) if names is not None else None, *known)


@functools.cache
def deciding(cls: type, *what: str) -> frozenset[str]:
    """The dotted paths of the settings that decide any of `what`."""
    return frozenset(
        setting.path for setting in settings(cls) if setting.decides.intersection(what)
    )


def values(config: Any) -> dict[str, Any]:
    """The values of a config's settings by dotted path, as JSON has them; of chosen rows alone."""
    return dict(_leaves(json.loads(to_json(config))))


def decisive(config: Any, *what: str) -> dict[str, Any]:
    """Those `values` of a config that decide any of `what`."""
    paths = deciding(type(config), *what)
    return {path: value for path, value in values(config).items() if path in paths}


def with_absolute_paths(config: Config, path: str = "config") -> Config:
    """The config with every path as it is from any directory, as its field says how.

    Raises:
      ValueError: a path cannot be one.
    """
    changes = {}
    for field, kind in _typed_fields(type(config)):
        value, absolute = getattr(config, field.name), field.metadata.get("path")
        here = f"{path}.{field.name}"
        if "registry" in field.metadata or dataclasses.is_dataclass(kind):
            changes[field.name] = with_absolute_paths(value, here)
        elif absolute and value is not None:
            try:
                changes[field.name] = absolute(value)
            except ValueError as error:
                raise ValueError(f"{here} is {value!r}: {error}") from error
    return dataclasses.replace(config, **changes)


def to_config_dict(config: Any) -> config_dict.ConfigDict:
    """The dataclass as a locked `ConfigDict`; rows that are not chosen appear with defaults.

    Raises:
      ValueError: a value is not of its field's type.
    """
    result = config_dict.ConfigDict()
    for field, kind in _typed_fields(type(config)):
        value, path = getattr(config, field.name), f"{type(config).__name__}.{field.name}"
        result[field.name] = _as_entry(value, field, kind, path)
    return result.lock()


def from_config_dict(config: Any, cls: type[Config], path: str = "config") -> Config:
    """The dataclass that a `ConfigDict`, or a JSON file's dict, stands for.

    A field that is absent takes its default; rows that are not chosen are not looked at.

    Raises:
      ValueError: a key that the class does not have, a value of another type, a name that is not
        in the registry, or what the dataclass itself refuses; with the path of the value.
    """
    _require_section(config, path)
    fields = {field.name: (field, kind) for field, kind in _typed_fields(cls)}
    for key in config:
        if key not in fields:
            raise ValueError(no_such_key(path, key, fields))
    given = {
        name: _from_entry(config[name], field, kind, f"{path}.{name}")
        for name, (field, kind) in fields.items()
        if name in config
    }
    try:
        return cls(**given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def to_json(config: Any) -> str:
    """The dataclass as JSON, for the file beside a run's checkpoints; only the rows chosen."""
    return json.dumps(_plain(config), indent=2) + "\n"


def from_json(text: str, cls: type[Config]) -> Config:
    """The dataclass that `to_json` wrote; fields that are newer than the file take defaults.

    A class may have `upgrade(content) -> content`, for what files of earlier versions call otherwise.
    """
    upgrade = getattr(cls, "upgrade", lambda content: content)
    content = json.loads(text)
    _require_section(content, "config")
    return from_config_dict(upgrade(content), cls)


def config_difference(old: str, new: str) -> list[Difference]:
    """The leaves in which two configs, each as `to_json` writes it, differ."""
    return list(_differences(json.loads(old), json.loads(new), ""))


def conform(value: Any, kind: Any, path: str) -> Any:
    """The value as an instance of a field's type; an int may stand for a float, a list for a tuple.

    Raises:
      ValueError: the value is of another type.
    """
    origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, tuple | list):
        return _conform_tuple(value, kind, path)
    if origin in (typing.Union, types.UnionType):
        return _conform_union(value, kind, path)
    if kind is float and type(value) is int:
        check_number(value, FINITE, path)  # or Python could not make a float of it
        return float(value)
    truth_for_number = isinstance(value, bool) and kind is not bool
    if isinstance(kind, type) and isinstance(value, kind) and not truth_for_number:
        return value
    raise _wrong_type(value, kind, path)


def kind_name(kind: Any) -> str:
    """A field's type in words: `int`, `float or none`, `tuple[int, ...]`."""
    if kind is type(None):
        return "none"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(map(kind_name, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _typed_fields(cls: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls) if field.init]


def _as_entry(value: Any, field: dataclasses.Field, kind: Any, path: str) -> Any:
    if registry := field.metadata.get("registry"):
        chosen = _name_in(registry, value)
        rows = {name: value if name == chosen else row() for name, row in registry.items()}
        branches = {name: to_config_dict(row) for name, row in rows.items()}
        return config_dict.ConfigDict({"name": chosen, **branches})
    if dataclasses.is_dataclass(kind):
        return to_config_dict(value)
    value, members = _checked(value, field, kind, path), typing.get_args(kind)
    if type(None) in members:
        return config_dict.FieldReference(value, field_type=_placeholder_type(members))
    return value


def _checked(value: Any, field: dataclasses.Field, kind: Any, path: str) -> Any:
    """A leaf's value as its type, inside of what its field states."""
    if kind is str and "names" in field.metadata:
        return check_name(value, field.metadata["names"], path)
    value = conform(value, kind, path)
    check_value(value, field.metadata, path)
    return value


def _placeholder_type(members: tuple[Any, ...]) -> type:
    """What ConfigDict lets a None-able field become; `conform` checks the rest."""
    others = [member for member in members if member is not type(None)]
    return (typing.get_origin(others[0]) or others[0]) if len(others) == 1 else object


def _from_entry(value: Any, field: dataclasses.Field, kind: Any, path: str) -> Any:
    if registry := field.metadata.get("registry"):
        _require_section(value, path)
        for key in value:
            if key != "name" and key not in registry:
                raise ValueError(no_such_key(path, key, ["name", *registry]))
        name = check_name(value.get("name"), registry, f"{path}.name")
        return from_config_dict(value.get(name, {}), registry[name], f"{path}.{name}")
    if dataclasses.is_dataclass(kind):
        return from_config_dict(value, kind, path)
    return _checked(value, field, kind, path)


def _require_section(value: Any, path: str) -> None:
    if not isinstance(value, Section):
        raise ValueError(f"{path} is {shown(value)}; it is a section of settings")


def _conform_tuple(value: Iterable[Any], kind: Any, path: str) -> tuple[Any, ...]:
    value, members = tuple(value), typing.get_args(kind)
    if len(members) == 2 and members[1] is Ellipsis:
        members = members[:1] * len(value)
    if len(members) != len(value):
        raise ValueError(
            f"{path} is {shown(value)}; it takes {len(members)} values, {kind_name(kind)}"
        )
    pairs = enumerate(zip(value, members, strict=True))
    return tuple(conform(item, member, f"{path}[{i}]") for i, (item, member) in pairs)


def _conform_union(value: Any, kind: Any, path: str) -> Any:
    for member in typing.get_args(kind):
        try:
            return conform(value, member, path)
        except ValueError:
            continue
    raise _wrong_type(value, kind, path)


def _wrong_type(value: Any, kind: Any, path: str) -> ValueError:
    return ValueError(f"{path} is {shown(value)}; it takes {kind_name(kind)}")


def _plain(config: Any) -> dict[str, Any]:
    result = {}
    for field, kind in _typed_fields(type(config)):
        value = getattr(config, field.name)
        if registry := field.metadata.get("registry"):
            name = _name_in(registry, value)
            result[field.name] = {"name": name, name: _plain(value)}
        else:
            result[field.name] = _plain(value) if dataclasses.is_dataclass(kind) else value
    return result


def _name_in(registry: Mapping[str, type], value: Any) -> str:
    for name, row in registry.items():
        if type(value) is row:
            return name
    raise ValueError(f"{value!r} is not of the registered classes: {', '.join(registry)}")


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, _join(path, key))
        else:
            yield _join(path, key), value


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> Iterator[Difference]:
    # Where another row of a registry was chosen, its name says so; the rows have nothing in common.
    replaced = {old.get("name"), new.get("name")} if old.get("name") != new.get("name") else set()
    for key in dict.fromkeys([*old, *new]):
        was, now = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _differences(was, now, _join(path, key))
        elif was != now and key not in replaced:
            yield Difference(_join(path, key), _as_json(was), _as_json(now))


_ABSENT = object()


def _as_json(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _help(cls: type, name: str) -> str:
    for base in cls.__mro__:
        if name in inspect.get_annotations(base):
            return _comments(base).get(name) or _from_docstring(base, name)
    return ""


def _from_docstring(cls: type, name: str) -> str:
    """The line `name: ...` of a docstring's list, or else the first sentence that has the name."""
    text = inspect.cleandoc(cls.__doc__ or "")
    if listed := re.search(rf"^\s+{name}: (.*)$", text, re.MULTILINE):
        return listed[1].rstrip(".")
    prose = " ".join(re.split(r"^\w+:$", text, flags=re.MULTILINE)[0].split())
    sentences = re.split(r"(?<=[.;]) (?=[A-Z`])", prose)
    return next((found.rstrip(".;") for found in sentences if f"`{name}`" in found), "")


@functools.cache
def _comments(cls: type) -> dict[str, str]:
    """For each field of a class the comment beside it, or else the lines of comment above it."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except OSError:  # a class that was made without a source file
        return {}
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
    result = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            beside = [comments[n] for n in range(node.lineno, node.end_lineno + 1) if n in comments]
            lines = beside or _above(comments, node.lineno)
            result[node.target.id] = " ".join(line.string.lstrip("# ") for line in lines)
    return result


def _above(comments: dict[int, tokenize.TokenInfo], line: int) -> list[tokenize.TokenInfo]:
    found: list[tokenize.TokenInfo] = []
    while (comment := comments.get(line - 1)) and not comment.line[: comment.start[1]].strip():
        found.insert(0, comment)
        line -= 1
    return found
