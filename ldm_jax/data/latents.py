"""The directory that `encode` writes and training reads: shards of records, and the manifest that tells what they are.

A record is one example: the scaled latents that the autoencoder made of an image, and its captions. Shards are
ArrayRecord files with one record a group, so that any record is one seek away.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from flax import serialization
from jaxtyping import Float16

from ldm_jax.files.buckets import in_bucket
from ldm_jax.files.durable import write_atomically
from ldm_jax.files.typed_json import read_json, write_json

VERSION = 1
MANIFEST = "manifest.json"
EMPTY_CAPTION = (
    "empty_caption.msgpack"  # the embedding of the empty caption, if embeddings are stored
)


class Record(NamedTuple):
    """One example.

    Attributes:
      key: its name in the source.
      latents: as the autoencoder scales them, about unit variance.
      captions: the main one, then alternatives.
      text: embeddings of the captions, if they are stored: the fields of `Cond` that it has, one row per caption.
    """

    key: str
    latents: Float16[np.ndarray, "H W C"]
    captions: tuple[str, ...]
    text: Mapping[str, np.ndarray] | None = None


def pack(record: Record) -> bytes:
    """A record as bytes: msgpack, with arrays as Flax writes them."""
    fields = record._asdict() | {"captions": list(record.captions)}
    return serialization.msgpack_serialize({k: v for k, v in fields.items() if v is not None})


def unpack(data: bytes) -> Record:
    """The inverse of `pack`."""
    fields = serialization.msgpack_restore(data)
    return Record(**fields | {"captions": tuple(fields["captions"])})


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Which autoencoder latents are of: its fingerprint, and their scaling (z - shift) * scale."""

    fingerprint: str
    shift: float
    scale: float


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records.

    Attributes:
      name: as `shard_name` gives it.
      records, bytes: number of records, and size of the file.
      first_key: key of the first record; empty where there is none, and in manifests older than this field.
    """

    name: str
    records: int
    bytes: int
    first_key: str = ""


def shard_name(number: int) -> str:
    """Returns the name of a directory's shard, by its place in the order of the source."""
    return f"latents-{number:05d}.array_record"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a directory of latents holds; the last thing that `encode` writes.

    Attributes:
      version: of this format.
      source: `provenance` of the source.
      size: side of the images in pixels.
      read, written: items of the source, and the records made of them.
      skipped: reason -> keys of the items that could not be used.
      latent_shape: [H, W, C].
      latent_mean, latent_std: of each channel, over all stored latents.
      autoencoder: what made the latents.
      text_encoder: fingerprint of what made the stored embeddings; empty where none are stored.
      shards: the files, in the order of the source.
      left_out: reason -> names of what the source found and gave no items of.
    """

    version: int
    source: dict[str, Any]
    size: int
    read: int
    written: int
    skipped: dict[str, list[str]]
    latent_shape: tuple[int, ...]
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    autoencoder: Autoencoder
    text_encoder: str
    shards: tuple[Shard, ...]
    left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Writes `manifest.json`, all of it or nothing."""
        write_atomically(
            directory / MANIFEST, write_json(dataclasses.asdict(self), indent=1).encode()
        )

    @classmethod
    def read_from(cls, directory: str | Path) -> "Manifest":
        """Reads `manifest.json`, and checks that it agrees with itself and with the shards.

        Raises:
          ValueError: if there is no finished directory of latents, the manifest is damaged or was changed, or a shard
            is missing, cut short, damaged or in the place of another.
        """
        if in_bucket(directory):
            raise ValueError(
                f"{directory} is no path: ArrayRecord reads file systems only, so mount the bucket (gcsfuse) or copy it"
            )
        path = Path(directory, MANIFEST)
        try:
            version = read_json(path, dict).get("version")
        except FileNotFoundError:
            raise ValueError(
                f"{directory} has no {MANIFEST}: encoding into it was not finished (the same command continues)"
            ) from None
        if version != VERSION:
            raise ValueError(f"{path} is of version {version}, not {VERSION}")
        manifest = read_json(path, cls)
        manifest._check_sums(path)
        for shard in manifest.shards:
            _check_shard(path.parent / shard.name, shard)
        return manifest

    def _check_sums(self, path: Path) -> None:
        for number, shard in enumerate(self.shards):
            if shard.name != shard_name(number):
                raise ValueError(
                    f"{path} names {shard.name} where {shard_name(number)} belongs: its shards were reordered, named"
                    " twice or left out; copy it again"
                )
        skipped = sum(map(len, self.skipped.values()))
        sums = {
            "shards.records": (sum(shard.records for shard in self.shards), self.written),
            "written and skipped": (self.written + skipped, self.read),
        }
        for name, (found, wanted) in sums.items():
            if found != wanted:
                raise ValueError(
                    f"{path}: {name} add up to {found}, not to {wanted}: it was changed; copy it again"
                )

    def require(self, *, autoencoder: str, text_encoder: str = "") -> None:
        """Refuses latents of another autoencoder, and embeddings of another text encoder (if one is given).

        Raises:
          ValueError: if a fingerprint differs.
        """
        pairs = [("latents", self.autoencoder.fingerprint, autoencoder)]
        if text_encoder:
            pairs.append(("text embeddings", self.text_encoder or "(none stored)", text_encoder))
        for what, stored, wanted in pairs:
            if stored != wanted:
                raise ValueError(
                    f"the {what} were made by the encoder {stored}, and this run has {wanted}: encode the source again"
                )


def _check_shard(path: Path, shard: Shard) -> None:
    stat = path.stat() if path.is_file() else None
    size = stat.st_size if stat else 0
    if stat is None or size != shard.bytes:
        raise ValueError(
            f"{path} has {size} bytes where the manifest says {shard.bytes}: copy it again"
        )
    records, first_key = _contents(path, (stat.st_ino, stat.st_mtime_ns))
    if records != shard.records:
        raise ValueError(
            f"{path} has {records} records where the manifest says {shard.records}: copy both again"
        )
    if shard.first_key not in ("", first_key):
        raise ValueError(
            f"{path} begins with {first_key!r} where the manifest says {shard.first_key!r}: it is another shard; copy"
            " both again"
        )


@functools.cache  # as several parts of a run read one manifest
def _contents(path: Path, state: tuple[int, int]) -> tuple[int, str]:
    """Returns the number of records in a shard and the key of the first; `state` changes when the file does."""
    try:
        with contextlib.closing(ArrayRecordReader(str(path))) as reader:
            records = reader.num_records()
            return records, unpack(reader.read([0])[0]).key if records else ""
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged: {reason}; copy it again") from error


class _Part(NamedTuple):
    """A whole shard, in the words of ArrayRecord's reader, which else opens every file to count its records."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def open_records(
    directory: str | Path, shards: Sequence[Shard]
) -> grain.sources.ArrayRecordDataSource:
    """All records of a directory, as bytes, by position."""
    parts = [
        _Part(str(Path(directory, shard.name)), 0, shard.records, shard.records)
        for shard in shards
        if shard.records
    ]
    return grain.sources.ArrayRecordDataSource(parts)


def main_captions(directory: str | Path, count: int) -> list[str]:
    """The main captions of the first records, in the order of the source.

    Raises:
      ValueError: if the directory is not finished, or holds fewer records.
    """
    manifest = Manifest.read_from(directory)
    if count > manifest.written:
        raise ValueError(f"{directory} holds {manifest.written} records, and {count} are asked for")
    records = open_records(directory, manifest.shards)
    return [unpack(records[index]).captions[0] for index in range(count)]
