"""Training batches from directories of latents, in an order that is a function of (seed, position) alone."""

import dataclasses
import fractions
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from flax import serialization

from ldm_jax.data.captions import CaptionPolicy
from ldm_jax.data.latents import EMPTY_CAPTION, Manifest, Record, open_records, unpack
from ldm_jax.types import Batch, Cond, Tokens

Tokenizer = Callable[[list[str]], Tokens]
Embedding = Mapping[str, np.ndarray]

_SEEDS_APART = 0x9E3779B9  # between parts, as grain adds the number of the epoch to a seed


class Example(NamedTuple):
    latents: np.ndarray
    text: str | Embedding
    index: int


@dataclasses.dataclass(frozen=True)
class _Choose:
    """A record at a position of the data order to the example that training sees there."""

    policy: CaptionPolicy
    seed: int
    empty: str | Embedding  # "" asks for captions, an embedding for embeddings

    def __call__(self, position: int, data: bytes) -> Example:
        record = unpack(data)
        choice = self.policy.choose(len(record.captions), self.seed, position)
        text = self.empty if choice is None else _text(record, choice, self.empty)
        return Example(record.latents, text, position)


@dataclasses.dataclass(frozen=True)
class Collate:
    """Examples to one batch of arrays; tokenising a list at a time is several times faster than one by one."""

    tokenizer: Tokenizer | None

    def __call__(self, examples: Sequence[Example]) -> Batch:
        texts = [example.text for example in examples]
        return Batch(
            latents=np.stack([example.latents for example in examples]).astype(np.float32),
            cond=self.tokenizer(texts) if self.tokenizer else _stack(texts),
            weight=np.ones(len(examples), np.float32),
            index=np.array([example.index for example in examples], np.uint32),
        )


class Mixture(grain.transforms.DatasetSelectionMap):
    """The part that each position of the data order takes its example from, and its position in that part's order.

    The parts alternate: any window of n positions holds n times the share of a part, to less than one example if there
    are two parts, and to less than k - 1 if there are k. Random draws would miss by about the square root of n, and a
    record's place in its part would depend on all draws before it. Here that place is a quotient of integers, so any
    position is found at once. Weights count as their decimals are written: 0.3 is 3/10.

    `grain.MapDataset.mix` alternates in this way too, but rounds weights to hundredths of the smallest: it makes 0.3
    and 0.7 into 100 and 233.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [fractions.Fraction(str(weight)) for weight in weights]
        unit = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * unit) for weight in exact]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Returns the part, and the number of earlier positions that take their examples from it."""
        earlier, total = position, sum(self._weights)
        for part, weight in enumerate(self._weights[:-1]):
            others = total - weight
            later_parts = earlier * others // total
            if (earlier + 1) * others // total == later_parts:
                return part, earlier - later_parts
            earlier, total = later_parts, others
        return len(self._weights) - 1, earlier


class Loader:
    """An endless iterator of `Batch`es of NumPy arrays over one or several directories of latents.

    Examples come from the directories by their weights, as `Mixture` says. Each directory has epochs of its own: every
    record of it is seen once, in an order of that epoch, before any is seen again. What stands at a position of the
    data order, its caption included, depends on the seed and the parts only: not on the batch size, nor on the number
    of processes. Those share a batch: process p of n has the positions p, p + n, ... of it.
    """

    def __init__(
        self,
        parts: Sequence[tuple[str | Path, float]],
        *,
        batch: int,
        seed: int,
        policy: CaptionPolicy = CaptionPolicy(),
        tokenizer: Tokenizer | None,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 2,
        prefetch: int = 4,
    ) -> None:
        """Opens the directories; reading begins with the first `next`.

        Args:
          parts: directories that `encode` wrote, each with its weight: the share of examples from it is its weight over
            the sum of the weights.
          batch: examples in the whole batch, of all processes.
          seed: of the order and of the choice of captions.
          policy: which caption an example gets.
          tokenizer: captions to tokens [B, L], from several threads; None takes the embeddings stored with the latents.
          process_index, process_count: which share of each batch is this process's.
          threads: how many of the next batches are made at a time.
          prefetch: batches that are kept ready.

        Raises:
          ValueError: if a directory is not finished or lacks what is asked for, the directories cannot be mixed, a
            weight is not a finite number above 0, or processes do not divide the batch.
        """
        if batch % process_count:
            raise ValueError(
                f"a batch of {batch} examples cannot be shared by {process_count} processes"
            )
        self.manifests = _read_manifests(parts, embeddings=tokenizer is None)
        self.batch = batch
        self._share = (process_index, process_count)
        self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        self._collate = Collate(tokenizer)
        choose = _Choose(policy, seed, _empty(Path(parts[0][0]), self.manifests[0], tokenizer))
        orders = [
            grain.MapDataset.source(open_records(directory, manifest.shards))
            .shuffle(seed ^ (number * _SEEDS_APART % 2**32))
            .repeat()
            for number, ((directory, _), manifest) in enumerate(
                zip(parts, self.manifests, strict=True)
            )
        ]
        mixture = Mixture([weight for _, weight in parts])
        self._examples = grain.MapDataset.select_from_datasets(orders, mixture).map_with_index(
            choose
        )
        self._iterator: grain.DatasetIterator | None = None
        self.seek(0)

    def __len__(self) -> int:
        """Records of all directories."""
        return sum(manifest.written for manifest in self.manifests)

    def seek(self, examples: int) -> None:
        """The next batch begins at position `examples` of the data order."""
        self.close()
        self._position = examples

    def close(self) -> None:
        """Ends the threads; the next batch would start them again, at the last `seek`."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        return next(self._iterator)

    def _start(self) -> grain.DatasetIterator:
        # grain's ElasticIterator makes the same slice, but its batches are stacked arrays: here they are
        # tokenised in the same threads, and the position is the training state's, not the iterator's.
        process, processes = self._share
        mine = self._examples[self._position + process :: processes]
        batches = mine.batch(self.batch // processes, drop_remainder=True, batch_fn=self._collate)
        return iter(batches.to_iter_dataset(self._options))


def _read_manifests(
    parts: Sequence[tuple[str | Path, float]], *, embeddings: bool
) -> tuple[Manifest, ...]:
    """Reads the manifests of the parts, and refuses parts that cannot be mixed."""
    if not parts:
        raise ValueError("parts is empty: give at least one directory of latents with its weight")
    for directory, weight in parts:
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(
                f"the weight of {directory} is {weight}: give a finite number above 0, or leave the part out"
            )
    directories = [Path(directory).resolve() for directory, _ in parts]
    manifests = tuple(Manifest.read_from(directory) for directory, _ in parts)
    fields = ["size", "latent_shape", "autoencoder", *(["text_encoder"] if embeddings else [])]
    for number, ((directory, _), manifest) in enumerate(zip(parts, manifests, strict=True)):
        if directories[number] in directories[:number]:
            raise ValueError(
                f"{directory} is given twice: give it once, with the sum of its weights"
            )
        if not manifest.written:
            raise ValueError(f"{directory} holds no record: leave it out")
        for field in fields:
            found, first = getattr(manifest, field), getattr(manifests[0], field)
            if found != first:
                raise ValueError(
                    f"{directory} and {parts[0][0]} cannot be mixed: their {field} is {found} and {first}; encode one"
                    " again as the other"
                )
    return manifests


def fixed_batch(
    directory: str | Path, indices: Sequence[int], *, tokenizer: Tokenizer | None
) -> Batch:
    """The records at `indices`, in the order of the source, each with its main caption: for validation.

    Raises:
      ValueError: if the directory is not finished, or has no record at one of the indices.
    """
    manifest = Manifest.read_from(directory)
    if not all(0 <= index < manifest.written for index in indices):
        raise ValueError(
            f"{directory} holds records 0 to {manifest.written - 1}, not all of {list(indices)}"
        )
    records = open_records(directory, manifest.shards)
    choose = _Choose(CaptionPolicy(0.0, 0.0), 0, _empty(Path(directory), manifest, tokenizer))
    return Collate(tokenizer)([choose(index, records[index]) for index in indices])


def _empty(directory: Path, manifest: Manifest, tokenizer: Tokenizer | None) -> str | Embedding:
    if tokenizer is not None:
        return ""
    if not manifest.text_encoder:
        raise ValueError(
            f"{directory} holds no text embeddings: encode it with them, or give a tokenizer"
        )
    stored = serialization.msgpack_restore((directory / EMPTY_CAPTION).read_bytes())
    return {name: rows[0] for name, rows in stored.items()}


def _text(record: Record, choice: int, empty: str | Embedding) -> str | Embedding:
    if isinstance(empty, str):
        return record.captions[choice]
    return {name: rows[choice] for name, rows in record.text.items()}


def _stack(texts: Sequence[Embedding]) -> Cond:
    columns = {name: np.stack([text[name] for text in texts]) for name in texts[0]}
    return Cond(
        **{name: c if c.dtype == bool else c.astype(np.float32) for name, c in columns.items()}
    )
