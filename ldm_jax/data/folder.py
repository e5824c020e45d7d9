"""A folder of images with their captions: `name.txt` beside each, or a metadata file as Hugging Face's imagefolder."""

import csv
import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.data.captions import as_captions
from ldm_jax.data.sources import Item, Skip, digest

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")


class _Listing(NamedTuple):
    keys: list[str]
    captions: dict[str, Any]  # from metadata files, by key
    identity: str


@dataclasses.dataclass(frozen=True)
class Folder:
    """All images in a folder and the folders in it, in the order of their names: `folder:/photos`.

    A `metadata.jsonl` or `metadata.csv` in any of the folders names files beside or below it by `file_name`, and
    their captions by the column `caption`; in JSON that may be a list: the main caption, then alternatives.
    An image that no metadata file names has its caption in a text file of the same name.

    Attributes:
      path: the folder.
      caption: the column of the captions.
    """

    path: str
    caption: str = "text"

    def __post_init__(self) -> None:
        if not os.path.isdir(self.path):
            raise ValueError(f"folder: there is no folder {self.path}")
        if not self._listing.keys:
            raise ValueError(f"folder: {self.path} holds no image ({', '.join(IMAGES)})")

    def __len__(self) -> int:
        return len(self._listing.keys)

    def __getitem__(self, index: int) -> Item:
        key = self._listing.keys[index]
        path = Path(self.path, key)
        try:
            return Item(key, path.read_bytes(), self._captions(key, path))
        except OSError as error:
            raise Skip(f"file cannot be read: {error.strerror}", key) from error

    @property
    def identity(self) -> str:
        """Changes with the names and sizes of the files, and with the metadata."""
        return self._listing.identity

    def _captions(self, key: str, path: Path) -> tuple[str, ...]:
        if key in self._listing.captions:
            return as_captions(self._listing.captions[key], key)
        try:
            return (path.with_suffix(".txt").read_bytes().decode("utf-8", "surrogateescape"),)
        except FileNotFoundError:
            return ()

    @functools.cached_property
    def _listing(self) -> _Listing:
        sizes = dict(sorted(_files(Path(self.path))))
        lines = [f"{key} {size}" for key, size in sizes.items()]
        captions = {}
        for key in sizes:
            if os.path.basename(key) in METADATA:
                rows = dict(self._read_metadata(key))
                captions.update(rows)
                lines += map(repr, rows.items())
        images = {key for key in sizes if key.lower().endswith(IMAGES)}
        return _Listing(sorted(images | captions.keys()), captions, digest(lines))

    def _read_metadata(self, key: str) -> Iterator[tuple[str, Any]]:
        path = Path(self.path, key)
        read = _read_csv if path.suffix == ".csv" else _read_jsonl
        for number, row in read(path):
            for column in ("file_name", self.caption):
                if column not in row:
                    columns = ", ".join(map(repr, row))
                    raise ValueError(f"{path}:{number} has no {column!r}; it has {columns}")
            if not isinstance(name := row["file_name"], str):
                raise ValueError(f"{path}:{number}: file_name is {name!r}, not the name of a file")
            yield os.path.normpath(os.path.join(os.path.dirname(key), name)), row[self.caption]


def _files(root: Path) -> Iterator[tuple[str, int]]:
    """Path below `root` and size of every file that matters, but for hidden ones; -1 for a link to nowhere."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if name in METADATA or name.lower().endswith((*IMAGES, ".txt")):
                path = Path(folder, name)
                size = path.stat().st_size if path.exists() else -1
                yield path.relative_to(root).as_posix(), size


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num} is no CSV: {error}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is no JSON: {error}") from error
