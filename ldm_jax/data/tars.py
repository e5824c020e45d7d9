"""Tar shards in webdataset's layout: the members of one name but for the extension are one sample."""

import dataclasses
import functools
import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from ldm_jax.data.captions import as_captions
from ldm_jax.data.images import ENDINGS
from ldm_jax.data.sources import Item, Skip, digest
from ldm_jax.data.text import decode

IMAGES = tuple(ending.removeprefix(".") for ending in ENDINGS)


class _Span(NamedTuple):
    offset: int
    size: int


class _Sample(NamedTuple):
    path: str
    key: str
    members: dict[str, _Span]  # by extension


@dataclasses.dataclass(frozen=True)
class Tars:
    """The samples of tar files, in order: `tars:/data/{000..010}.tar`.

    A sample has its image by one of `images.ENDINGS`, and its caption as `.txt` or in a field of `.json`.
    The headers are read once, at the opening; after that any sample is one seek away.

    Attributes:
      paths: the files; `{000..010}` counts, and `*`, `?` and `[...]` match as in a shell.
      caption: the field of the JSON that holds the caption, or a list of them: the main one, then alternatives.
    """

    paths: str
    caption: str = "caption"

    def __post_init__(self) -> None:
        if not self._samples:
            raise ValueError(f"tars: {self.paths} holds no sample")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Item:
        sample = self._samples[index]
        image = next((sample.members[name] for name in IMAGES if name in sample.members), None)
        if image is None:
            raise Skip("no image", sample.key)
        try:
            return Item(sample.key, _read(sample.path, image), self._captions(sample))
        except OSError as error:
            raise Skip(f"file cannot be read: {error.strerror}", sample.key) from error

    @functools.cached_property
    def identity(self) -> str:
        """Changes with the names and sizes of the files' members."""
        return digest(f"{sample.key} {sorted(sample.members.items())}" for sample in self._samples)

    def _captions(self, sample: _Sample) -> tuple[str, ...]:
        if "txt" in sample.members:
            text = _read(sample.path, sample.members["txt"])
            return (decode(text),)
        if "json" not in sample.members:
            return ()
        text = decode(_read(sample.path, sample.members["json"]))
        try:
            captions = json.loads(text).get(self.caption)
        except (ValueError, AttributeError):
            raise Skip("JSON cannot be read", sample.key) from None
        return as_captions(captions, sample.key)

    @functools.cached_property
    def _samples(self) -> list[_Sample]:
        return [sample for path in expand(self.paths) for sample in _index(path)]


def expand(pattern: str) -> list[str]:
    """The files that a pattern of `{first..last}` ranges and shell wildcards names.

    Raises:
      ValueError: if a file of a range does not exist, or nothing matches.
    """
    found = []
    for path in _count(pattern):
        matches = sorted(glob.glob(path))
        if not matches:
            raise ValueError(f"tars: there is no file {path}")
        found += matches
    return found


def _count(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    rests = _count(pattern[match.end() :])
    return [pattern[: match.start()] + number + rest for number in numbers for rest in rests]


def _index(path: str) -> Iterator[_Sample]:
    members: dict[str, dict[str, _Span]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, name = os.path.split(member.name)
                    stem, _, extension = name.partition(".")
                    spans = members.setdefault(os.path.join(folder, stem), {})
                    spans[extension.lower()] = _Span(member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"tars: {path} cannot be read as an uncompressed tar: {error}") from error
    for key, spans in members.items():
        yield _Sample(path, f"{os.path.basename(path)}/{key}", spans)


def _read(path: str, span: _Span) -> bytes:
    with open(path, "rb") as file:
        file.seek(span.offset)
        return file.read(span.size)
