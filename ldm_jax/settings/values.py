"""Flags as fields of a dataclass, and types of flags: each turns a text into a value, or raises argparse's error."""

import argparse
import dataclasses
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from ldm_jax.settings.ranges import check_seed

Request = TypeVar("Request")


def flag(default: Any, help: str, **options: Any) -> Any:
    """Makes the field of a dataclass that a flag of its name sets; `options` are argparse's."""
    return dataclasses.field(default=default, metadata={"flag": {"help": help, **options}})


def add_flags_of(cls: type, parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of the dataclass that `flag` made."""
    for field in dataclasses.fields(cls):
        if "flag" in field.metadata:
            name = f"--{field.name.replace('_', '-')}"
            parser.add_argument(name, default=field.default, **field.metadata["flag"])


def from_flags(cls: type[Request], flags: argparse.Namespace) -> Request:
    """Makes the dataclass of what was parsed. Raises as the dataclass itself."""
    return cls(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(cls)})


def list_of(kind: type) -> Callable[[str], list[Any]]:
    """Makes a parser of numbers with commas between them; each is kept once."""

    def parse(text: str) -> list[Any]:
        try:
            return list(dict.fromkeys(kind(part) for part in text.split(",")))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no list of {'whole ' if kind is int else ''}numbers with commas between them"
            ) from None

    return parse


def names_of(what: str, names: Collection[str]) -> Callable[[str], list[str]]:
    """Makes a parser of names with commas between them, all of which are in `names`."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in names]:
            raise argparse.ArgumentTypeError(
                f"there is no {what} {unknown[0]!r}; there are {', '.join(names)}"
            )
        return found

    return parse


def seeds(text: str) -> list[int]:
    """Parses seeds with commas between them."""
    try:
        return [check_seed(seed, "a seed") for seed in list_of(int)(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from error


def num_bytes(text: str) -> int:
    """Parses a number of bytes, such as 2e9."""
    try:
        if (given := int(float(text))) >= 1:
            return given
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes from 1 on, such as 2e9")
