"""Checkpoints that are whole or are not there, and that are believed only after a look at them.

Orbax writes and reads the arrays. Around it stand a manifest with the name, shape, dtype and digest
of every leaf, kept in the checkpoint's metadata, and the rule for which checkpoint is used:

- one of another model is an error that names the leaves;
- a damaged one (torn, truncated, a flipped bit) is named in a warning and the one before is used;
- when none is left that is an error too: training never starts afresh by itself.
"""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32
from orbax.checkpoint import v1 as ocp

from ldm_jax.files.buckets import in_bucket
from ldm_jax.files.durable import naming
from ldm_jax.parallel.distributed import lost
from ldm_jax.parallel.rules import leaf_name
from ldm_jax.training.loop import TrainingError
from ldm_jax.training.state import State

_log = logging.getLogger(__name__)
_TEMPORARY = ".orbax-checkpoint-tmp"
# Devices that hold the same array share the work of writing it, in slices of at least so many bytes each: cutting a
# small one would hold up training for longer than it saves.
_SLICE = 2**20
_COMMITTED = "commit_success.txt"  # the last file that Orbax writes, on every file system
# Seconds that a process waits within a save for the others, which may have failed. Orbax's own 1200 s pass in silence.
SAVE_TIMEOUT = 300


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Drops the pages that Orbax logs of a failure: it raises as well, and that is told here."""
    return "/orbax/checkpoint/" not in record.pathname


class _Damaged(Exception):
    """A checkpoint cannot be trusted; the message says why."""


class Checkpoints:
    """The checkpoints of one run, named by the examples seen: `directory/000000051200/`.

    Any path that `etils.epath` knows will do. All processes call every method together.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 3) -> None:
        """Keeps the newest `keep`; an old one is deleted only after a newer one is whole."""
        if keep < 1:
            raise ValueError(f"keep is the number of checkpoints kept and at least 1, got {keep}.")
        path = os.fspath(directory)  # Orbax wants it absolute; a bucket's is
        self.directory = epath.Path(path if in_bucket(path) else os.path.abspath(path))
        self.keep = keep
        self._pending: tuple[int, ocp.AsyncResponse, bool] | None = None
        self._damaged: set[int] = set()
        logging.getLogger("absl").addFilter(_not_from_orbax)

    def check_writable(self) -> None:
        """Checks before training that every process can write here, which is not so where one has mounted it read-only.

        Raises:
          OSError: in all processes, if one of them cannot.
        """
        here = self.directory if self.directory.is_dir() else self.directory.parent
        try:
            _together(lambda: _probe(here))
        except Exception as error:  # buckets raise many kinds
            if lost(error):
                raise
            raise OSError(
                f"The run cannot be saved in {here} ({_sentence(error)}); make it writable for every process."
            ) from error

    def save(self, state: State, losses: Sequence[float] = (), *, replace: bool = True) -> None:
        """Saves the state: copied when this returns, written in the background.

        `losses` are the newest ones, for `Guard`; without `replace` no older checkpoint is deleted after this one. A
        save that is still under way is waited for. A checkpoint of these examples that is there already is left alone.

        Raises:
          OSError: this checkpoint, or the one that was under way, could not be written.
          TrainingError: the state holds a number that is not finite.
        """
        self.wait()
        examples, leaves = int(state.examples), _named(state)
        size = sum(leaf.nbytes for leaf in leaves.values())
        with self._explained(examples):
            if _together(lambda: self._is_there(examples, size)):
                return
        manifest, poisoned = _describe(leaves)
        if poisoned:
            raise TrainingError(
                f"The state after {examples} examples has numbers that are not finite and is not "
                f"saved: {_some(poisoned)}."
            )
        with self._explained(examples):
            try:
                content = {"leaves": manifest, "losses": list(losses)}
                _together(lambda: self._start(examples, leaves, _sealed(content), replace))
            except Exception:
                self._pending = None  # in all processes, as in that which failed
                raise

    def wait(self) -> None:
        """Waits for the save under way, if any, and then deletes what is too old.

        Raises:
          OSError: the checkpoint could not be written.
        """
        if self._pending is not None:
            with self._explained(self._pending[0]):
                _together(self._finish)

    def close(self) -> None:
        """Waits as `wait`, but without the other processes, which may have ended."""
        if self._pending is not None:
            with self._explained(self._pending[0]):
                self._finish()

    def _start(
        self, examples: int, leaves: dict[str, Any], metadata: dict[str, Any], replace: bool
    ) -> None:
        context = ocp.Context()
        context.array.saving.min_slice_bytes_for_replica_parallel = _SLICE
        context.asynchronous.timeout_secs = SAVE_TIMEOUT
        with context:
            response = ocp.save_async(
                self._path(examples),
                _nested(leaves),
                custom_metadata=metadata,
                overwrite=True,  # A damaged one, since the others are among the usable.
            )
        self._pending = examples, response, replace

    def _finish(self) -> None:
        (_, response, replace), self._pending = self._pending, None
        response.result()
        if jax.process_index() == 0 and replace:
            for old in self._usable()[: -self.keep]:
                self._path(old).rmtree()

    def latest(self) -> int | None:
        """The examples seen by the newest whole checkpoint; a save under way is waited for.

        Whole is what was written to its end: `restore` looks whether it is sound as well.
        """
        self.wait()
        return self._newest()

    def losses(self, examples: int) -> list[float]:
        """Returns the losses that were saved with this checkpoint; none where there is no such checkpoint."""
        found = examples in self._usable()
        return _unsealed(self._path(examples)).get("losses", []) if found else []

    def restore(self, abstract: State, only: Collection[str] = State._fields) -> State:
        """The newest checkpoint that is sound, placed as `abstract_state` says, on whatever mesh.

        With `only`, e.g. `("ema",)`, the other fields are not read and stay abstract.

        Raises:
          FileNotFoundError: there is no checkpoint, or none that is sound.
          ValueError: the newest one holds other leaves, shapes or dtypes than `abstract`.
        """
        self.wait()
        wanted = {k: v for k, v in _named(abstract).items() if k.partition("/")[0] in only}
        for examples in reversed(self._usable()):
            try:
                found = self._load(examples, wanted)
            except _Damaged as reason:
                self._damaged.add(examples)
                _log.warning(
                    "The checkpoint %s is damaged and not used: %s.", self._path(examples), reason
                )
            else:
                return _filled(abstract, found)
        raise FileNotFoundError(f"There is no sound checkpoint in {self.directory}.")

    def _load(self, examples: int, wanted: dict[str, Any]) -> dict[str, Any]:
        path = self._path(examples)
        manifest = _unsealed(path)["leaves"]
        _compare(manifest, wanted, path)
        partly = ocp.Context()
        partly.pytree.loading.partial_load = True
        try:
            with partly:
                found = _named(ocp.load(path, _nested(wanted)))
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # Too little memory says nothing about the checkpoint.
        except Exception as error:  # Orbax raises many kinds, plain `Exception` among them.
            raise _Damaged(_sentence(error)) from error
        seen, _ = _describe(found)
        wrong = [name for name in wanted if seen[name] != manifest[name]]
        if wrong:
            raise _Damaged(f"the digest does not match for {_some(wrong)}")
        return found

    def _newest(self) -> int | None:
        return max(self._usable(), default=None)

    def _usable(self) -> list[int]:
        try:  # to ask `is_dir` would take a bucket that does not answer for an empty one
            self.directory.stat()  # of one that is not there TensorFlow's listing says so by another error
            there = [path for path in self.directory.iterdir() if path.name.isdigit()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        whole = {int(path.name) for path in there if (path / _COMMITTED).exists()}
        return sorted(whole - self._damaged)

    def _path(self, examples: int) -> epath.Path:
        return self.directory / f"{examples:012d}"

    def _is_there(self, examples: int, size: int) -> bool:
        """Checks that this process can write here; the first one returns whether this checkpoint is there already.

        Raises:
          OSError: a process cannot write, or there is no room for a new checkpoint.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        _probe(self.directory)
        if jax.process_index() != 0:
            return False
        self._sweep()
        there = examples in self._usable()
        if not there:
            self._check_room(size)
        return there

    def _sweep(self) -> None:
        """Removes what a killed run or a full disk left unfinished; only a writer may do so."""
        for path in self.directory.iterdir():
            if _TEMPORARY in path.name:
                with suppress(OSError):  # a thread of a failed save may still write there
                    path.rmtree()

    def _check_room(self, needed: int) -> None:
        """Tells of a full disk beforehand, where it can be known, and more plainly than Orbax."""
        if os.path.isdir(self.directory):  # not so for a bucket
            free = shutil.disk_usage(self.directory).free
            if needed > free:
                raise OSError(f"it takes {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free")

    @contextmanager
    def _explained(self, examples: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises many kinds.
            if lost(error):
                raise
            raise OSError(
                f"The checkpoint of {examples} examples could not be written to {self.directory} "
                f"({_sentence(error)}); the newest whole one there is of {self._newest()} examples."
            ) from error


def _probe(directory: epath.Path) -> None:
    """Writes a file and removes it: Orbax lets the others wait for a process that cannot."""
    path = directory / f"writable-{jax.process_index()}"
    with naming(path):
        path.write_bytes(b"yes")
        path.unlink()


def _together(do: Callable[[], Any]) -> bool:
    """Does it in every process, and returns whether it was true in any; where one fails, so do all."""
    found, fault = False, None
    try:
        found = bool(do())
    except Exception as error:  # Orbax raises many kinds.
        fault = error
    outcomes = np.array([found, fault is not None])
    found, failed = multihost_utils.process_allgather(outcomes).reshape(-1, 2).any(0)
    if fault is not None:
        raise fault
    if failed:
        raise OSError("another process could not; its log says why")
    return bool(found)


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by their paths."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts, so that a checkpoint can be read without this library or its optimiser."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *branches, last = name.split("/")
        branch = tree
        for part in branches:
            branch = branch.setdefault(part, {})
        branch[last] = leaf
    return tree


def _filled(abstract: State, leaves: dict[str, Any]) -> State:
    fill = lambda path, leaf: leaves.get(leaf_name(path), leaf)  # noqa: E731
    return jax.tree_util.tree_map_with_path(fill, abstract)


def _describe(leaves: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What the manifest says of each leaf, and the names of those that are not finite."""
    # Leaf by leaf, since leaves of one shape, as most are, share one small compiled program. Of those that sum over
    # devices XLA runs only one at a time on CPUs without the danger that they wait for each other for ever.
    one_by_one = jax.default_backend() == "cpu"
    prints = {}
    for name, leaf in leaves.items():
        found = _fingerprint(leaf)
        prints[name] = jax.block_until_ready(found) if one_by_one else found
    prints = jax.device_get(prints)
    manifest = {
        name: [list(leaf.shape), str(leaf.dtype), int(prints[name][0])]
        for name, leaf in leaves.items()
    }
    return manifest, [name for name, (_, poisoned) in prints.items() if poisoned]


def _sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Adds a digest: a flipped bit in the manifest must not read as a checkpoint of another model."""
    parts = (json.dumps(content[name], sort_keys=True) for name in sorted(content))
    return content | {"seal": zlib.crc32("".join(parts).encode())}


def _unsealed(path: epath.Path) -> dict[str, Any]:
    """Returns what was saved beside the arrays: "leaves", the manifest, and "losses", which older checkpoints lack."""
    try:
        metadata = dict(ocp.metadata(path).custom_metadata)
        content = {name: part for name, part in metadata.items() if name != "seal"}
    except Exception as error:  # Orbax raises many kinds.
        raise _Damaged(_sentence(error)) from error
    if _sealed(content) != metadata:
        raise _Damaged("its manifest is not the one that was written")
    return content


def _compare(manifest: dict[str, Any], wanted: dict[str, Any], path: epath.Path) -> None:
    fields = {name.partition("/")[0] for name in wanted}
    there = {name for name in manifest if name.partition("/")[0] in fields}
    lacking, foreign = sorted(set(wanted) - there), sorted(there - set(wanted))
    if lacking or foreign:
        raise ValueError(
            f"The checkpoint {path} is of another model or optimiser: it lacks {_some(lacking)}, "
            f"and holds beyond what is asked for {_some(foreign)}."
        )
    for name, leaf in wanted.items():
        shape, dtype, _ = manifest[name]
        if (shape, dtype) != (list(leaf.shape), str(leaf.dtype)):
            raise ValueError(
                f"The checkpoint {path} holds {name} as {dtype}{shape}, "
                f"asked for is {leaf.dtype}{list(leaf.shape)}."
            )


@jax.jit
def _fingerprint(array: Array) -> UInt32[Array, "2"]:
    """A digest of an array, and how many of its numbers are not finite.

    The digest is the sum mod 2^32 of mixed words: the bits of a number, exclusive-or a hash of its
    position, through a bijection. It depends on no sharding and no order of summation. A change of
    any one number changes one term and so the sum, for certain; any other change goes unseen with
    a chance of 2^-32.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(array, width).astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for dim, size in enumerate(words.shape):
        position = position * size + jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
    terms = _mixed(words ^ _mixed(position + 1))
    poisoned = (~jnp.isfinite(array)).astype(jnp.uint32)
    return jnp.sum(jnp.stack([terms, poisoned]), axis=range(1, words.ndim + 1), dtype=jnp.uint32)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3 (Appleby 2011), a bijection."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:3]) or "nothing"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _sentence(error: BaseException) -> str:
    """What an error stems from, in one line that can be read."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).partition(" [")[0].split())  # TensorStore appends its whole spec
    return f"{type(error).__name__}: {text if len(text) < 300 else text[:80] + '...' + text[-200:]}"
