"""The directory that `encode` writes and training reads: shards of records, and the manifest that tells what they are.

A record is one example: the scaled latents that the autoencoder made of an image, and its captions. Shards are
ArrayRecord files with one record a group, so that any record is one seek away.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from flax import serialization
from jaxtyping import Float16

from ldm_jax.files.buckets import in_bucket
from ldm_jax.files.durable import write_atomically

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
      text: embeddings of the captions, if they are stored: the fields of `Cond` that are given ("tokens", "mask",
        "pooled"), one row a caption.
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
    """One file of records: its name, number of records and size in bytes."""

    name: str
    records: int
    bytes: int


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
            directory / MANIFEST, json.dumps(dataclasses.asdict(self), indent=1).encode()
        )

    @classmethod
    def read_from(cls, directory: str | Path) -> "Manifest":
        """Reads `manifest.json`, and checks that the shards it names are there in full.

        Raises:
          ValueError: if there is no finished directory of latents, or a shard is missing or cut short.
        """
        if in_bucket(directory):
            raise ValueError(
                f"{directory} is no path: ArrayRecord reads file systems only, so mount the bucket (gcsfuse) or copy it"
            )
        directory = Path(directory)
        try:
            fields = json.loads((directory / MANIFEST).read_bytes())
        except FileNotFoundError:
            raise ValueError(
                f"{directory} has no {MANIFEST}: encoding into it was not finished (the same command continues)"
            ) from None
        if fields["version"] != VERSION:
            raise ValueError(
                f"{directory / MANIFEST} is of version {fields['version']}, not {VERSION}"
            )
        lists = ("latent_shape", "latent_mean", "latent_std")
        fields.update({name: tuple(fields[name]) for name in lists})
        fields["autoencoder"] = Autoencoder(**fields["autoencoder"])
        fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
        manifest = cls(**fields)
        manifest._check_shards(directory)
        return manifest

    def _check_shards(self, directory: Path) -> None:
        for shard in self.shards:
            path = directory / shard.name
            size = path.stat().st_size if path.exists() else 0
            if size != shard.bytes:
                raise ValueError(
                    f"{path} has {size} bytes where the manifest says {shard.bytes}: copy it again"
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
