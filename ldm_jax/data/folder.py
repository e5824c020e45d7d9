"""A folder of images with their captions: `name.txt` beside each, or a metadata file as Hugging Face's imagefolder."""

import collections
import dataclasses
import functools
import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.data.captions import as_captions
from ldm_jax.data.images import ENDINGS
from ldm_jax.data.metadata import read_rows
from ldm_jax.data.sources import Item, Skip, digest, tally
from ldm_jax.data.text import decode, is_unicode

METADATA = ("metadata.jsonl", "metadata.csv")

_log = logging.getLogger(__name__)


class _Listing(NamedTuple):
    keys: list[str]
    captions: dict[str, list[Any]]  # by key, of each row of metadata; a Skip where there is none
    left_out: dict[str, list[str]]
    identity: str


@dataclasses.dataclass(frozen=True)
class Folder:
    """All images in a folder and the folders in it, in the order of their names: `folder:/photos`.

    A `metadata.jsonl` or `metadata.csv` in any of the folders names files beside or below it by `file_name`, and
    their captions by the column `caption`; in JSON that may be a list: the main caption, then alternatives. Further
    rows for one file add alternatives. An image that no metadata file names has its caption in a text file of the
    same name.

    Only regular files inside the folder are read. Links to folders are not followed.

    Attributes:
      path: the folder.
      caption: the column of the captions.
    """

    path: str
    caption: str = "text"

    def __post_init__(self) -> None:
        if os.path.isfile(self.path):
            raise ValueError(f"folder: {self.path} is a file; give the folder of the images")
        if not os.path.isdir(self.path):
            raise ValueError(f"folder: there is no folder {self.path}")
        left_out = tally(self.left_out)
        if not self._listing.keys:
            raise ValueError(
                f"folder: {self.path} holds no image ({', '.join(ENDINGS)}); left out: {left_out}"
            )
        if self.left_out:
            _log.info("folder: left out of %s: %s", self.path, left_out)

    def __len__(self) -> int:
        return len(self._listing.keys)

    def __getitem__(self, index: int) -> Item:
        key = self._listing.keys[index]
        if not is_unicode(key):
            raise Skip("name is not UTF-8", key)
        if "\0" in key:
            raise Skip("NUL in name", key)
        captions = self._captions(key)
        return Item(key, self._read(key), captions)

    @property
    def identity(self) -> str:
        """Changes with the names and sizes of the files, and with the metadata."""
        return self._listing.identity

    @property
    def left_out(self) -> Mapping[str, Sequence[str]]:
        """What is in the folder and is no image, caption of one or metadata: endings or reasons, with the paths.

        Hidden files and folders are not among them.
        """
        return self._listing.left_out

    def _captions(self, key: str) -> tuple[str, ...]:
        if key in self._listing.captions:
            return _join(self._listing.captions[key], key)
        text = _text_of(key)
        if not os.path.lexists(os.path.join(self.path, text)):
            return ()
        return (decode(self._read(text)),)

    def _read(self, key: str) -> bytes:
        """Returns the content of a file. Raises Skip for one that is not a regular file inside the folder."""
        path = os.path.realpath(os.path.join(self.path, key))
        if not Path(path).is_relative_to(os.path.realpath(self.path)):
            raise Skip("file outside the folder", key)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise Skip("not a regular file", key)
            return Path(path).read_bytes()
        except OSError as error:
            raise Skip(f"file cannot be read: {error.strerror}", key) from error

    @functools.cached_property
    def _listing(self) -> _Listing:
        files, left_out = _walk(self.path)
        sizes = {key: _size(os.path.join(self.path, key)) for key in sorted(files)}
        lines = [f"{key} {size}" for key, size in sizes.items()]
        captions = collections.defaultdict(list)
        for key in sizes:
            if os.path.basename(key) in METADATA:
                for name, value in self._read_metadata(key):
                    captions[name].append(value)
                    lines.append(repr((name, value)))
        images = {key for key in sizes if key.lower().endswith(ENDINGS)} | captions.keys()
        texts = {key for key in sizes if key.lower().endswith(".txt")}
        left_out[".txt without image"] += texts - set(map(_text_of, images))
        left_out = {
            reason: unnamed
            for reason, paths in sorted(left_out.items())
            if (unnamed := sorted(set(paths) - captions.keys()))
        }
        return _Listing(sorted(images), dict(captions), left_out, digest(lines))

    def _read_metadata(self, key: str) -> Iterator[tuple[str, Any]]:
        """Yields key and captions of each row; a row that cannot be used has a Skip in their place."""
        path = os.path.join(self.path, key)
        try:
            text = decode(self._read(key))
        except Skip as skip:
            raise ValueError(f"{path} cannot be used: {skip.reason}") from skip
        for number, row in read_rows(text, path, ("file_name", self.caption)):
            if isinstance(row, Skip):
                yield f"{key}:{number}", row
                continue
            name, value = row
            if not isinstance(name, str):
                raise ValueError(f"{path}:{number}: file_name is {name!r}, not the name of a file")
            file = os.path.join(self.path, os.path.dirname(key), name)
            yield os.path.relpath(file, self.path), _captions_or_skip(value, key)


def _text_of(key: str) -> str:
    """Returns the path of the text file that holds an image's caption."""
    return os.path.splitext(key)[0] + ".txt"


def _join(rows: Sequence[Any], key: str) -> tuple[str, ...]:
    for value in rows:
        if isinstance(value, Skip):
            raise Skip(value.reason, key)
    return tuple(caption for value in rows for caption in as_captions(value, key))


def _captions_or_skip(value: Any, key: str) -> Any:
    try:
        as_captions(value, key)
    except Skip as skip:
        return skip
    return value


def _walk(root: str) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the files that matter, and by ending or reason all others, as paths below `root`; no hidden ones."""
    files, left_out = [], collections.defaultdict(list)

    def below(*names: str) -> str:
        return Path(*names).relative_to(root).as_posix()

    def leave_out(error: OSError) -> None:
        left_out["folder that cannot be read"].append(below(error.filename))

    for folder, folders, names in os.walk(root, onerror=leave_out):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                left_out["linked folder"].append(below(folder, name))
        for name in names:
            if name.startswith("."):
                continue
            known = name in METADATA or name.lower().endswith((*ENDINGS, ".txt"))
            ending = os.path.splitext(name)[1].lower() or "file without ending"
            (files if known else left_out[ending]).append(below(folder, name))
    return files, left_out


def _size(path: str) -> int:
    """Returns the size in bytes; -1 for a link to nowhere."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
