"""From images and captions to a directory of latents: what `python -m ldm_jax.encode` runs.

The source is cut into equal runs of items, and each run becomes one shard with a file of statistics beside it.
Both appear by an atomic rename, the statistics last, so a shard is finished exactly if its statistics are there.
Whenever the process dies, the same call continues with the first shard that is not finished.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from flax import serialization
from jaxtyping import UInt8
from tqdm import tqdm

from ldm_jax.data.captions import check_captions
from ldm_jax.data.images import to_square
from ldm_jax.data.latents import (
    EMPTY_CAPTION,
    MANIFEST,
    VERSION,
    Autoencoder,
    Manifest,
    Record,
    Shard,
    pack,
    shard_name,
)
from ldm_jax.data.sources import Skip, Source, provenance
from ldm_jax.files.durable import alone_in, claim, explained_disk_errors, publish, write_atomically
from ldm_jax.files.typed_json import read_json, write_json
from ldm_jax.parallel import one_ahead
from ldm_jax.types import Cond, Images, Latent

_SHARD_OPTIONS = "group_size:1,uncompressed"  # float16 latents shrink by 8% only, and reading takes 2.5 times as long


class TextEncoder(NamedTuple):
    """What embeds captions that are to be stored; it is given `batch` captions at a time."""

    encode: Callable[[list[str]], Cond]
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Limits:
    """What makes an item unusable.

    Attributes:
      min_side: fewest pixels of an image's shorter side.
      max_caption: most characters of a caption.
      max_skipped: the share of unusable items from which on encoding is an error.
    """

    min_side: int = 16
    max_caption: int = 4000
    max_skipped: float = 0.05


class _Example(NamedTuple):
    key: str
    image: UInt8[np.ndarray, "size size 3"]
    captions: tuple[str, ...]


@dataclasses.dataclass
class _Statistics:
    """What is written down beside a finished shard; summed up, what the manifest says of all."""

    records: int = 0
    bytes: int = 0
    first_key: str = ""
    shape: list[int] = dataclasses.field(default_factory=list)
    total: list[float] = dataclasses.field(default_factory=list)  # sums over each channel
    squares: list[float] = dataclasses.field(default_factory=list)
    skipped: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # reason -> keys

    @property
    def num_skipped(self) -> int:
        return sum(map(len, self.skipped.values()))

    def skip(self, skip: Skip) -> None:
        self.skipped.setdefault(skip.reason, []).append(skip.key)

    def add(self, z: Latent) -> None:
        values = z.astype(np.float64)
        sums = _Statistics(
            records=len(z),
            shape=list(z.shape[1:]),
            total=values.sum((0, 1, 2)).tolist(),
            squares=(values**2).sum((0, 1, 2)).tolist(),
        )
        self.merge(sums)

    def merge(self, other: "_Statistics") -> None:
        self.records += other.records
        self.bytes += other.bytes
        self.shape = self.shape or other.shape
        for name in ("total", "squares"):
            pair = [sums for sums in (getattr(self, name), getattr(other, name)) if sums]
            setattr(self, name, np.sum(pair, axis=0).tolist() if pair else [])
        for reason, keys in other.skipped.items():
            self.skipped.setdefault(reason, []).extend(keys)


def encode(
    source: Source,
    encoder: Callable[[Images], Latent],
    directory: str | Path,
    *,
    autoencoder: Autoencoder,
    size: int,
    batch: int = 32,
    workers: int = 4,
    items_per_shard: int = 4096,
    limits: Limits = Limits(),
    text: TextEncoder | None = None,
    progress: bool = True,
) -> Manifest:
    """Encodes every usable item of `source` into `directory`, or finishes what an earlier call began there.

    Args:
      source: the items.
      encoder: images [batch, size, size, 3] in [-1, 1] to scaled latents; jitted by the caller.
      directory: where shards and manifest go; it belongs to this one source, autoencoder and size.
      autoencoder: what `encoder` is, for the manifest.
      size: side of the images in pixels.
      batch: images that are encoded together; a shard's last batch is padded to it.
      workers: threads that read, decode and resize; the records do not depend on it.
      items_per_shard: items of the source behind one shard. A dying process loses at most one shard's work.
      limits: what is skipped, and how much of it is too much.
      text: if given, the captions' embeddings are stored too.
      progress: whether to draw a progress bar.

    Raises:
      ValueError: if the directory was begun with other settings, too many items cannot be used, or latents are
        not finite.
      OSError: if the disk is full or cannot be written. Finished shards stay.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    job = _Job(source, encoder, directory, size, batch, workers, items_per_shard, limits, text)
    with explained_disk_errors(directory), alone_in(directory):
        claim(directory, job.settings | {"autoencoder": dataclasses.asdict(autoencoder)})
        if (directory / MANIFEST).exists():
            return Manifest.read_from(directory)
        if text is not None:
            empty = _embed(text, [("",)], batch)[0]
            write_atomically(directory / EMPTY_CAPTION, serialization.msgpack_serialize(empty))
        done = sum(len(items) for path, items in job.shards() if _statistics_of(path).exists())
        with tqdm(total=len(source), initial=done, unit=" items", disable=not progress) as bar:
            shards, whole = job.run(bar)
        _summarise(job, autoencoder, shards, whole).write(directory)
    return Manifest.read_from(directory)


@dataclasses.dataclass(frozen=True)
class _Job:
    """The arguments of `encode`, and the work on one shard after the other."""

    source: Source
    encoder: Callable[[Images], Latent]
    directory: Path
    size: int
    batch: int
    workers: int
    items_per_shard: int
    limits: Limits
    text: TextEncoder | None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which records come out, and in which files."""
        return {
            "source": provenance(self.source),
            "size": self.size,
            "items_per_shard": self.items_per_shard,
            "min_side": self.limits.min_side,
            "max_caption": self.limits.max_caption,
            "text_encoder": self.text.fingerprint if self.text else "",
        }

    def shards(self) -> Iterator[tuple[Path, range]]:
        """The files to be made, each with its items of the source."""
        total = len(self.source)
        for number, first in enumerate(range(0, total, self.items_per_shard)):
            items = range(first, min(first + self.items_per_shard, total))
            yield self.directory / shard_name(number), items

    def run(self, bar: tqdm) -> tuple[list[Shard], _Statistics]:
        """Makes the shards that are not there yet; returns all of them, and their statistics in sum."""
        shards, whole = [], _Statistics()
        for path, items in self.shards():
            if _statistics_of(path).exists():
                shard = read_json(_statistics_of(path), _Statistics)
            else:
                shard = self._make_shard(path, items, whole, bar)
            whole.merge(shard)
            shards.append(Shard(path.name, shard.records, shard.bytes, shard.first_key))
        self._check_skipped(whole)
        return shards, whole

    def _make_shard(self, path: Path, items: range, before: _Statistics, bar: tqdm) -> _Statistics:
        partial = path.with_name(path.name + ".partial")
        shard = _Statistics()
        batches = self._batches(items, shard, before, bar)
        with contextlib.closing(ArrayRecordWriter(str(partial), _SHARD_OPTIONS)) as writer:
            # The accelerator works on one batch while the one before it is written.
            for examples, z in one_ahead((each, self._start(each)) for each in batches):
                for record in self._records(examples, z, shard):
                    shard.first_key = shard.first_key or record.key
                    writer.write(pack(record))
        shard.bytes = partial.stat().st_size
        publish(partial, path)
        write_atomically(_statistics_of(path), write_json(dataclasses.asdict(shard)).encode())
        return shard

    def _batches(
        self, items: range, shard: _Statistics, before: _Statistics, bar: tqdm
    ) -> Iterator[list[_Example]]:
        """The usable items in order, `batch` at a time; the others are counted."""
        decode = functools.partial(_decode, self.source, self.size, self.limits)
        options = grain.ReadOptions(
            num_threads=self.workers, prefetch_buffer_size=2 * max(self.batch, self.workers)
        )
        decoded = grain.MapDataset.range(items.start, items.stop).map(decode)
        examples = []
        for outcome in decoded.to_iter_dataset(options):
            bar.update()
            if isinstance(outcome, Skip):
                shard.skip(outcome)
                bar.set_postfix(skipped=before.num_skipped + shard.num_skipped, refresh=False)
                self._check_skipped(before, shard)
                continue
            examples.append(outcome)
            if len(examples) == self.batch:
                yield examples
                examples = []
        if examples:
            yield examples

    def _start(self, examples: list[_Example]) -> Latent:
        images = np.zeros((self.batch, self.size, self.size, 3), np.float32)
        for row, example in zip(images, examples, strict=False):
            row[:] = example.image / np.float32(127.5) - 1
        return self.encoder(images)

    def _records(self, examples: list[_Example], z: Latent, shard: _Statistics) -> Iterator[Record]:
        with np.errstate(over="ignore"):
            z = np.asarray(z)[: len(examples)].astype(np.float16)
        finite = np.isfinite(z).all((1, 2, 3))
        if not finite.all():
            key = examples[int(finite.argmin())].key
            raise ValueError(f"the latents of {key} are not finite in float16")
        shard.add(z)
        captions = [example.captions for example in examples]
        texts = _embed(self.text, captions, self.batch) if self.text else [None] * len(examples)
        for example, row, embedded in zip(examples, z, texts, strict=True):
            yield Record(example.key, row, example.captions, embedded)

    def _check_skipped(self, *parts: _Statistics) -> None:
        """Raises once it is certain that too many items cannot be used."""
        total, share = len(self.source), self.limits.max_skipped
        count = sum(part.num_skipped for part in parts)
        if count > share * total or count == total:
            skipped = collections.defaultdict(list)
            for part in parts:
                for reason, keys in part.skipped.items():
                    skipped[reason] += keys
            commonest = sorted(skipped.items(), key=lambda item: -len(item[1]))[:3]
            reasons = ", ".join(f"{reason} ({len(k)}, such as {k[0]})" for reason, k in commonest)
            raise ValueError(
                f"{count} of {total} items cannot be used, where max_skipped allows a share of {share}; the commonest"
                f" reasons: {reasons}; finished shards stay in {self.directory}"
            )


def _statistics_of(shard: Path) -> Path:
    """The file beside a shard whose presence means that the shard is finished."""
    return shard.with_suffix(".json")


def _decode(source: Source, size: int, limits: Limits, index: int) -> _Example | Skip:
    key = f"item {index}"
    try:
        item = source[index]
        key = _printable(item.key)
        if key != item.key:
            raise Skip("name is not UTF-8")
        image = to_square(item.image, size, min_side=limits.min_side)
        return _Example(key, image, check_captions(item.captions, limits.max_caption))
    except Skip as skip:
        return Skip(skip.reason, _printable(skip.key or key))


def _printable(key: str) -> str:
    """Returns a key with an escape for each surrogate, which stands for bytes of a name that were not UTF-8."""
    return key.encode("utf-8", "backslashreplace").decode()


def stored(cond: Cond) -> dict[str, np.ndarray]:
    """Returns the fields that a `Cond` has as they are stored: numbers in float16, sizes in pixels in float32."""
    present = {name: np.asarray(x) for name, x in cond._asdict().items() if x is not None}
    exact = {"mask": bool, "sizes": np.float32}
    return {name: x.astype(exact.get(name, np.float16)) for name, x in present.items()}


def _embed(
    text: TextEncoder, captions: Sequence[Sequence[str]], batch: int
) -> list[dict[str, np.ndarray]]:
    """Embeddings of each example's captions, computed in batches of one size."""
    flat = [caption for group in captions for caption in group]
    padded = flat + [""] * (-len(flat) % batch)
    conds = [text.encode(padded[i : i + batch]) for i in range(0, len(padded), batch)]
    columns = stored(jax.tree.map(lambda *parts: np.concatenate(parts), *conds))
    ends = np.cumsum([len(group) for group in captions])
    starts = [0, *ends[:-1]]
    return [
        {name: column[start:end] for name, column in columns.items()}
        for start, end in zip(starts, ends, strict=True)
    ]


def _summarise(
    job: _Job, autoencoder: Autoencoder, shards: list[Shard], whole: _Statistics
) -> Manifest:
    height, width, _ = whole.shape
    count = whole.records * height * width
    mean = np.array(whole.total) / count
    variance = np.array(whole.squares) / count - mean**2
    return Manifest(
        version=VERSION,
        source=provenance(job.source),
        size=job.size,
        read=len(job.source),
        written=whole.records,
        skipped=whole.skipped,
        latent_shape=tuple(whole.shape),
        latent_mean=tuple(mean.tolist()),
        latent_std=tuple(np.sqrt(np.maximum(variance, 0)).tolist()),
        autoencoder=autoencoder,
        text_encoder=job.text.fingerprint if job.text else "",
        shards=tuple(shards),
        left_out=dict(getattr(job.source, "left_out", {})),
    )
