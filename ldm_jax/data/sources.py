"""Where captioned images come from: one protocol, and one line of text that opens any row of `SOURCES`.

    folder:/photos
    tfds:coco_captions?split=train&caption=captions/text
    tars:/data/{000..010}.tar
    scenes:simple?count=20000&seed=0

The part after the colon is the first field of the source's dataclass, the options are its other fields.
A new source is one file and one row.
"""

import dataclasses
import hashlib
import importlib
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

# A name stands for a class by "module:Class", which is imported when it is opened: some need TensorFlow.
SOURCES: dict[str, str] = {
    "folder": "ldm_jax.data.folder:Folder",
    "tfds": "ldm_jax.data.tfds:Tfds",
    "tars": "ldm_jax.data.tars:Tars",
    "scenes": "ldm_jax.data.scenes:Scenes",
}

ON_DISK = ("folder", "tars")  # those whose argument is a path


class Item(NamedTuple):
    """One captioned image.

    Attributes:
      key: what names it within its source.
      image: an encoded file (JPEG, PNG, ...), or uint8 pixels [rows, columns, 3].
      captions: the main one, then alternatives. Bytes that were no UTF-8 stand in them as surrogates, as
        `bytes.decode("utf-8", "surrogateescape")` leaves them.
    """

    key: str
    image: bytes | np.ndarray
    captions: tuple[str, ...]


class Skip(ValueError):
    """An item that cannot be used.

    Attributes:
      reason: why, in words that are the same for all items of one kind, so that they can be counted.
      key: the item, where the one who raises knows it.
    """

    def __init__(self, reason: str, key: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.key = key


@runtime_checkable
class Source(Protocol):
    """A sequence of items, read from several threads at once.

    Sources are frozen dataclasses whose fields are their options. One that reads files also has `identity`, a
    string that changes when the files do (`provenance`), and may have `left_out`, what it found and gives no items
    of: reason -> names.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item:
        """The item at `index`; it raises `Skip` for one that cannot be read."""
        ...


def open_source(spec: str) -> Source:
    """Opens the source that `spec` names, as `name:argument?option=value&option=value`.

    Raises:
      ValueError: for an unknown name or option, or a value of another type than the option's.
    """
    name, argument, options = _split(spec)
    if name not in SOURCES:
        hint = f"; for files write {_source_of(name)}:{spec}" if _is_path(name) else ""
        raise ValueError(
            f"no data source is called {name!r} in {spec!r}; there are {_list(SOURCES)}{hint}"
        )
    module, _, attribute = SOURCES[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    types = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    given = ({next(iter(fields)): argument} if argument else {}) | options
    for option in given:
        if option not in fields:
            raise ValueError(f"{spec!r}: {name} has no option {option!r}; it has {_list(fields)}")
    for option, field in fields.items():
        if option not in given and field.default is dataclasses.MISSING:
            raise ValueError(f"{spec!r} does not say which {option}: write {name}:<{option}>")
    return cls(
        **{option: _parse(spec, option, text, types[option]) for option, text in given.items()}
    )


def _is_path(name: str) -> bool:
    return os.sep in name or os.path.exists(name)


def _source_of(path: str) -> str:
    return "tars" if path.endswith(".tar") else "folder"


def _split(spec: str) -> tuple[str, str, dict[str, str]]:
    # Only `?word=` begins the options: a pattern of file names may hold question marks too.
    match = re.fullmatch(r"([^:?]*)(?::(.*?))?(?:\?(\w+=.*))?", spec)
    if match is None:
        raise ValueError(
            f"{spec!r} is no data source: write name:argument?option=value&option=value"
        )
    name, argument, options = match.groups(default="")
    pairs = [part.partition("=") for part in options.split("&") if part]
    return name, argument, {option: text for option, _, text in pairs}


def _parse(spec: str, option: str, text: str, kind: type) -> Any:
    if kind is bool:
        values = {"true": True, "false": False}
        if text.lower() in values:
            return values[text.lower()]
    else:
        try:
            return kind(text)
        except ValueError:
            pass
    raise ValueError(f"{spec!r}: {option} is {text!r}, which is no {kind.__name__}")


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


def provenance(source: Source) -> dict[str, Any]:
    """What is written down about a source: its class, options, number of items and the identity of its files."""
    identity = getattr(source, "identity", "")
    return {**options_of(source), "items": len(source), "identity": identity}


def options_of(source: Source) -> dict[str, Any]:
    """Returns the class and the options of a source; nothing is read."""
    options = {}
    if dataclasses.is_dataclass(source):
        fields = [field for field in dataclasses.fields(source) if field.init]
        options = {field.name: getattr(source, field.name) for field in fields}
    return {"class": type(source).__name__, **options}


def tally(reasons: Mapping[str, Sequence[str]]) -> str:
    """The number of keys for each reason: "2 no caption, 1 empty file"; "none" if there is no reason."""
    return ", ".join(f"{len(keys)} {reason}" for reason, keys in reasons.items()) or "none"


def digest(lines: Iterable[str]) -> str:
    """An identity for a listing of files: 16 hexadecimal digits."""
    total = hashlib.blake2b(digest_size=8)
    for line in lines:
        total.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return total.hexdigest()
