"""Sets of images that others are compared with: their features in one file, with where they come from.

A Fréchet distance to the statistics of another network, another size of images or another way to resize them is a
number without a meaning, so a file says what it is of, and nothing else is compared with it.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from etils import epath

from ldm_jax.data.images import size_of, to_square
from ldm_jax.data.sources import Skip, Source, provenance
from ldm_jax.evals.features import Features, read_features, write_features
from ldm_jax.types import Images, SomeImages

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What features are of.

    Attributes:
      source: of the images, and what identifies its files.
      count: images.
      skipped: items of the source that could not be read.
      size: side of the images in pixels, before any extractor resizes them.
      extractors: by name, the fingerprint of the network's weights and what is done to images before it.
    """

    source: Any
    count: int
    skipped: int
    size: int
    extractors: Mapping[str, tuple[str, str]]
    version: int = VERSION


@dataclasses.dataclass(frozen=True)
class Reference:
    """Features [m, ...] by extractor and name, and their provenance; `digest` tells it from all others."""

    features: Features
    provenance: Provenance

    @functools.cached_property
    def digest(self) -> str:
        """Of all features and of what they are of, 16 hexadecimal digits."""
        total = hashlib.sha256(repr(sorted(dataclasses.asdict(self.provenance).items())).encode())
        for extractor, by_name in sorted(self.features.items()):
            for name, array in sorted(by_name.items()):
                total.update(f"{extractor}/{name} {array.shape}".encode())
                total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()[:16]

    def write(self, path: epath.PathLike) -> None:
        """One .npz file, whole or not at all."""
        write_features(path, self.features, dataclasses.asdict(self.provenance))

    @classmethod
    def read(cls, path: epath.PathLike) -> "Reference":
        """What `write` wrote. Raises FileNotFoundError, or ValueError for another file."""
        features, described = read_features(path)
        if set(described or ()) != {field.name for field in dataclasses.fields(Provenance)}:
            raise ValueError(f"{path} is no reference that `python -m ldm_jax.reference` wrote")
        extractors = {name: tuple(row) for name, row in described["extractors"].items()}
        return cls(features, Provenance(**described | {"extractors": extractors}))

    def require(self, path: Any, *, size: int, extractors: Mapping[str, tuple[str, str]]) -> None:
        """Checks that features of images of `size` pixels, by these extractors, may be compared with its own.

        Raises ValueError; it says what differs. Extractors that the reference has not are no fault.
        """
        if size != self.provenance.size:
            raise ValueError(
                f"{path} is of images of {self.provenance.size} pixels, and these have {size}: make one of that size"
            )
        for name in extractors.keys() & self.features.keys():
            if extractors[name] != self.provenance.extractors[name]:
                theirs, ours = (
                    "{} ({})".format(*row[name]) for row in (self.provenance.extractors, extractors)
                )
                raise ValueError(
                    f"{path} is of another {name}: {theirs}, and here it is {ours}; make it anew with this one"
                )


class SourceImages:
    """The images of a source in [-1, 1], in parts of `batch`, from item `start` on; iterating reads it.

    Without `exact` they are the squares in the middle, resized; with it they have to be squares of `size` pixels
    already, and all of them readable, since they belong to prompts.

    Attributes:
      count: images that were read.
      skipped: items that could not be, by reason.
    """

    def __init__(
        self,
        source: Source,
        *,
        size: int,
        batch: int,
        workers: int,
        exact: bool = False,
        start: int = 0,
    ) -> None:
        self._source, self._size, self._exact = source, size, exact
        self._batch, self._workers, self._start = batch, workers, start
        self.count = 0
        self.skipped: collections.Counter[str] = collections.Counter()

    def __iter__(self) -> Iterator[SomeImages]:
        """Raises ValueError, with `exact`, for an image of another size and for one that cannot be read."""
        ahead = 2 * max(self._batch, self._workers)
        options = grain.ReadOptions(num_threads=self._workers, prefetch_buffer_size=ahead)
        dataset = grain.MapDataset.range(self._start, len(self._source)).map(self._read)
        rows = []
        for found in dataset.to_iter_dataset(options):
            if isinstance(found, Skip):
                self._skip(found)
                continue
            rows.append(found / np.float32(127.5) - 1)
            self.count += 1
            if len(rows) == self._batch:
                yield np.stack(rows)
                rows = []
        if rows:
            yield np.stack(rows)

    def __getitem__(self, number: int) -> Images:
        """One image, [1, size, size, 3]."""
        found = self._read(number)
        if isinstance(found, Skip):
            raise ValueError(f"{found.key}: {found.reason}")
        return found[None] / np.float32(127.5) - 1

    def rows(self, numbers: Iterable[int]) -> Images:
        """Some images, by their numbers. Raises ValueError as iterating does."""
        return np.concatenate([self[int(number)] for number in numbers])

    def _skip(self, skip: Skip) -> None:
        if self._exact:
            raise ValueError(f"{skip.key}: {skip.reason}; every image of an evaluation is read")
        self.skipped[skip.reason] += 1

    def _read(self, index: int) -> np.ndarray | Skip:
        key = f"item {index}"
        try:
            item = self._source[index]
            key = item.key
            if self._exact and (found := size_of(item.image)) != (self._size, self._size):
                return Skip(
                    f"{found[0]} x {found[1]} pixels, and images are to have {self._size}", key
                )
            return to_square(item.image, self._size, min_side=1)
        except Skip as skip:
            return Skip(skip.reason, skip.key or key)


class Truth:
    """The images that others should be, read when they are asked for: `truth[numbers]` is [n, size, size, 3].

    `order` holds, for each of the others, the number of its image.
    """

    def __init__(self, images: SourceImages, order: Sequence[int]) -> None:
        self._images, self._order = images, list(order)

    def __getitem__(self, numbers: np.ndarray) -> Images:
        return self._images.rows([self._order[number] for number in numbers.tolist()])

    @property
    def described(self) -> dict[str, str]:
        """A digest of the order; nothing where each image stands in the place of its own."""
        if self._order == sorted(self._order):
            return {}
        return {"order": hashlib.sha256(repr(self._order).encode()).hexdigest()[:16]}


def provenance_of(
    source: Source,
    images: SourceImages,
    *,
    size: int,
    extractors: Mapping[str, tuple[str, str]],
) -> Provenance:
    """Of features of all images of a source, once they are read."""
    facts = provenance(source), images.count, images.skipped.total()
    return Provenance(*facts, size, dict(extractors))
