"""Tar shards in webdataset's layout: the members of one name but for the extension are one sample."""

import dataclasses
import functools
import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from ldm_jax.data.captions import as_captions
from ldm_jax.data.images import ENDINGS
from ldm_jax.data.sources import Item, Skip, digest
from ldm_jax.data.text import decode

IMAGES = tuple(ending.removeprefix(".") for ending in ENDINGS)

_LARGEST = 2**30  # bytes of a member that is read
_PADDING = 2**20  # more bytes of zeros than any program writes at the end of a tar
# What `tarfile` raises for files that are no tars and for headers that make no sense.
_ERRORS = (tarfile.TarError, ValueError, LookupError, ArithmeticError, MemoryError, RecursionError)


class _Span(NamedTuple):
    offset: int
    size: int


class _Sample(NamedTuple):
    path: str
    key: str
    members: dict[str, _Span | str]  # by extension; a text says why the member cannot be used


@dataclasses.dataclass(frozen=True)
class Tars:
    """The samples of tar files, in order: `tars:/data/{000..010}.tar`.

    A sample has its image by one of `images.ENDINGS` (the first of these that is there), and its caption as `.txt` or
    else in a field of `.json`. The headers are read once, at the opening; after that any sample is one seek away. A tar
    that is damaged or cut short is refused at the opening, as nobody can tell what it has lost.

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
        image = next((name for name in IMAGES if name in sample.members), None)
        if image is None:
            raise Skip("no image", sample.key)
        return Item(sample.key, _read(sample, image), self._captions(sample))

    @functools.cached_property
    def identity(self) -> str:
        """Changes with the names and sizes of the files' members."""
        return digest(f"{sample.key} {sorted(sample.members.items())}" for sample in self._samples)

    def _captions(self, sample: _Sample) -> tuple[str, ...]:
        if "txt" in sample.members:
            return (_read_text(sample, "txt"),)
        if "json" not in sample.members:
            return ()
        text = _read_text(sample, "json")
        try:
            captions = json.loads(text).get(self.caption)
        except (ValueError, AttributeError, RecursionError):
            raise Skip("JSON cannot be read", sample.key) from None
        return as_captions(captions, sample.key)

    @functools.cached_property
    def _samples(self) -> list[_Sample]:
        samples, damaged = [], []
        for path in expand(self.paths):
            try:
                samples += _index(path)
            except _ERRORS as error:
                damaged.append(f"{path} cannot be read as an uncompressed tar: {error}")
        if damaged:
            raise ValueError("tars: " + "; ".join(damaged))
        return samples


def expand(pattern: str) -> list[str]:
    """The files that a pattern of `{first..last}` ranges and shell wildcards names.

    Raises:
      ValueError: if a file of a range does not exist, nothing matches, or a match is not a regular file.
    """
    found = []
    for path in _count(pattern):
        matches = sorted(glob.glob(path))
        if not matches:
            raise ValueError(f"tars: there is no file {path}")
        found += matches
    for path in found:
        if not os.path.isfile(path):
            raise ValueError(
                f"tars: {path} is not a regular file; for the tars in a folder write tars:FOLDER/*.tar"
            )
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
    """Yields the samples of a tar, in the order of their first members."""
    places: dict[str, _Span | str] = {}
    for member in _members(path):
        if not member.isdir():
            _enter(places, member.name, _place(member, places))
    samples: dict[str, dict[str, _Span | str]] = {}
    for name, place in places.items():
        folder, file = os.path.split(name)
        stem, _, extension = file.partition(".")
        _enter(samples.setdefault(os.path.join(folder, stem), {}), extension.lower(), place)
    for key, members in samples.items():
        yield _Sample(path, f"{os.path.basename(path)}/{key}", members)


def _enter(places: dict[str, _Span | str], name: str, place: _Span | str) -> None:
    places[name] = "two members of one name" if name in places else place


def _place(member: tarfile.TarInfo, before: dict[str, _Span | str]) -> _Span | str:
    """Returns where the bytes of a member are, or why it cannot be used."""
    if member.islnk():
        return before.get(member.linkname, "hard link to a file that is not in the tar")
    if not member.isreg():
        return "not a regular file"
    if member.issparse():
        return "sparse file"
    if member.size > _LARGEST:
        return f"file of more than {_LARGEST // 2**20} MiB"
    return _Span(member.offset_data, member.size)


def _members(path: str) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar. `tarfile` takes for its end any header but the first that it cannot read.

    Raises:
      tarfile.TarError: if the file is damaged or cut short; `_ERRORS` lists what else `tarfile` raises.
    """
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
        for member in tar:
            if tar.offset <= member.offset:
                raise tarfile.ReadError(f"the size of {member.name!r} is negative")
            yield member
        _check_end(file, tar.offset)


def _check_end(file: BinaryIO, end: int) -> None:
    """Checks that zeros, which mark the end of a tar, and nothing else follow its last member.

    Several tars in one file are refused too: they look like one tar in which zeros have replaced some members.
    """
    file.seek(end)
    found = file.read(_PADDING)
    if len(found) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(
            f"it ends at byte {end} without the zeros that mark the end of a tar, so it may be cut short; copy it"
            f" again, or, if its writer leaves the zeros out, append them: head -c 1024 /dev/zero >> {file.name}"
        )
    if any(found[: tarfile.BLOCKSIZE]):
        raise tarfile.ReadError(f"it is damaged at byte {end}; copy it again")
    if any(found) or len(found) == _PADDING:
        raise tarfile.ReadError(
            f"it goes on after byte {end}, where zeros mark the end of a tar; copy it again, as zeros may have replaced"
            " a part of it, or, if several tars were put into one file, give each as a file of its own"
        )


def _read(sample: _Sample, extension: str) -> bytes:
    place = sample.members[extension]
    if isinstance(place, str):
        raise Skip(place, sample.key)
    try:
        with open(sample.path, "rb") as file:
            file.seek(place.offset)
            data = file.read(place.size)
    except OSError as error:
        raise Skip(f"file cannot be read: {error.strerror}", sample.key) from error
    if len(data) < place.size:
        raise Skip("file cannot be read: the tar was cut short", sample.key)
    return data


def _read_text(sample: _Sample, extension: str) -> str:
    return decode(_read(sample, extension))
