"""Weights in and out: directories as diffusers and transformers write them, read and written by one table of names."""

import collections
import contextlib
import dataclasses
import gc
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (teaches NumPy, and so safetensors, bfloat16)
import numpy as np
from jax.experimental import multihost_utils
from safetensors import safe_open
from safetensors.numpy import save_file

from ldm_jax.models.json_files import naming, read_json, typed
from ldm_jax.models.names import Entry, Names, current_key, entries, flatten, to_ours, to_theirs
from ldm_jax.types import Params

STEMS = ("diffusion_pytorch_model", "model")
DTYPES = ("float32", "float16")
READABLE = (
    "F64",
    "F32",
    "F16",
    "BF16",
)  # the others are integers, or need scales that lie elsewhere
STORED = ("dtype", "torch_dtype")  # transformers' names for what weights are stored in
MAX_SHARD_SIZE = 10_000_000_000  # bytes: diffusers' default; readers take files of any size
NAMED = 5  # tensors that an error message names before it only counts

_INDEX = ".safetensors.index.json"
_FP16_INDEX = ".safetensors.index.fp16.json"
_WEIGHTS = re.compile(  # every file that holds weights, or lists those that do
    rf"({'|'.join(STEMS)})(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.safetensors(\.index(\.fp16)?\.json)?"
)


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The content of `config.json`. Raises FileNotFoundError, or ValueError where it is no JSON object."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no config.json; {_content(Path(directory))}")
    return read_json(path)


def load(
    directory: str | os.PathLike, like: Params, names: Names, *, shardings: Any = None
) -> Params:
    """The parameters in `directory`, with the structure, shapes and dtypes of `like` (ShapeDtypeStructs will do).

    `shardings`, a tree like `like`, says where each parameter lies: every device gets its part of it, and no more, as
    soon as it is read, so that a host holds one parameter at a time beside those that are placed. Full precision is
    preferred where the directory also has an fp16 variant.

    Raises FileNotFoundError without a file of weights, ValueError for a tensor that is missing, left over or of
    another shape.
    """
    places = [] if shardings is None else [shardings]
    return jax.tree.map(_placed, lazy(directory, like, names), *places)


def lazy(directory: str | os.PathLike, like: Params, names: Names) -> Params:
    """As `load`, but each leaf is read when it is made a NumPy array, and every time anew.

    With them `save` copies networks that fit no host.
    """
    return fitted(_in_files(Path(directory)), like, names, where=str(directory))


def fitted(tensors: Iterable[tuple[str, Any]], like: Params, names: Names, *, where: str) -> Params:
    """As `lazy`, of keys and tensors (arrays, or what NumPy makes arrays of), which errors say are in `where`."""
    stored = _Stored(tensors, names, where)
    expected = entries(like, names)
    stored.check(expected)
    parts: dict[str, list[Entry]] = {}
    for entry in expected:
        parts.setdefault(entry.path, []).append(entry)
    leaves = [
        _Unread(stored, parts[path], leaf.shape, np.dtype(leaf.dtype))
        for path, leaf in flatten(like).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def save(
    directory: str | os.PathLike,
    params: Params,
    names: Names,
    config: Mapping[str, Any],
    *,
    dtype: str = "float32",
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Writes `config.json` and safetensors files, which `from_pretrained` of the class named in `config` opens.

    `config` is what the network's `to_diffusers` or `to_transformers` gives, or a file that says the same and more;
    where transformers names the dtype of the weights in it, it becomes `dtype`, which is float32 or float16. What takes
    more than `max_shard_size` bytes is divided into files that do not, with an index beside them; only a tensor that
    is larger by itself makes a larger file. The host holds the tensors of one file at a time. Where parameters lie on
    several hosts, all processes call this, and process 0 writes.

    Weights that were there stay whole until the new ones are; then they go, whatever files they were in, fp16 variants
    included.

    Raises ValueError for another dtype, and for a size below 1.
    """
    if dtype not in DTYPES:
        raise ValueError(f"weights can be saved as {' or '.join(DTYPES)}, not as {dtype!r}")
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size is {max_shard_size} bytes; it is at least 1")
    found = entries(params, names)
    tensors = _tensors(params, found, dtype)
    if jax.process_index():
        collections.deque(tensors, maxlen=0)  # gathering them takes all processes
        return
    stem = STEMS[0] if "_class_name" in config else STEMS[1]
    sizes = {entry.key: math.prod(entry.shape) * np.dtype(dtype).itemsize for entry in found}
    files = _divided(sizes, max_shard_size, stem)
    stored = {name: dtype for name in STORED if name in config and stem == STEMS[1]}
    with _replacing(Path(directory)) as unfinished:
        described = _write_json(unfinished / "config.json", {**config, **stored})
        for name, keys in files.items():
            metadata = {"format": "pt"}  # transformers refuses a file without it
            save_file(dict(itertools.islice(tensors, len(keys))), unfinished / name, metadata)
            shutil.copymode(described, unfinished / name)  # save_file lets nobody else read it
        if len(files) > 1:
            weight_map = {key: name for name, keys in files.items() for key in keys}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            _write_json(unfinished / f"{stem}{_INDEX}", index)


def fingerprint(params: Params) -> str:
    """16 hexadecimal digits that identify parameters: a digest of every path, shape, dtype and value."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(params).items()):
        array = np.asarray(_on_host(leaf), np.float32, order="C")
        dtype = "" if leaf.dtype == np.float32 else f" {leaf.dtype}"
        digest.update(f"{path} {array.shape}{dtype}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


class _Stored:
    """Tensors under the keys of an up-to-date file."""

    def __init__(self, tensors: Iterable[tuple[str, Any]], names: Names, where: str) -> None:
        self.where = where
        self.tensors: dict[str, Any] = {}
        for key, tensor in tensors:
            name = current_key(key, names)
            if name in self.tensors and name not in names.tied:
                raise ValueError(f"{where} has two tensors for {name}; the other is {key}")
            if name is not None:
                self.tensors[name] = tensor

    def check(self, expected: list[Entry]) -> None:
        shapes = {entry.key: entry.shape for entry in expected}
        given = {key: tensor.shape for key, tensor in self.tensors.items()}
        missing = sorted(shapes.keys() - given.keys())
        leftover = sorted(given.keys() - shapes.keys())
        reshaped = sorted(
            f"{key} {list(given[key])}, not {list(shape)}"
            for key, shape in shapes.items()
            if key in given and _taps_aside(shape) != _taps_aside(given[key])
        )
        faults = {"lack": missing, "also have": leftover, "have another shape for": reshaped}
        faults = [f"{verb} {_listed(keys)}" for verb, keys in faults.items() if keys]
        if faults:
            raise ValueError(
                f"the weights in {self.where} do not fit the network: they {', and '.join(faults)}"
            )

    def read(self, entry: Entry) -> np.ndarray:
        """A parameter, or one layer of it."""
        return to_ours(np.asarray(self.tensors[entry.key]).reshape(entry.shape), entry.form)


@dataclasses.dataclass(frozen=True)
class _InFile:
    """A tensor of an open safetensors file, read every time anew; ValueError for one that holds no real numbers."""

    file: Path
    handle: Any
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.handle.get_slice(self.key).get_shape())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if (kind := self.handle.get_slice(self.key).get_dtype()) not in READABLE:
            raise ValueError(
                f"{self.file}: {self.key} is stored as {kind}; only {', '.join(READABLE)} can be read"
            )
        array = self.handle.get_tensor(self.key)
        return array if dtype is None else array.astype(dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class _Unread:
    """A parameter that is not put together yet: the one tensor that it is, or the tensors of its layers."""

    stored: _Stored
    parts: list[Entry]
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.empty(self.shape, self.dtype)
        for entry in self.parts:
            array[... if entry.layer is None else entry.layer] = self.stored.read(entry)
        return array if dtype is None else array.astype(dtype, copy=False)


def _placed(leaf: _Unread, sharding: Any = None) -> jax.Array:
    """The parameter on its devices; waits for them, so that it has left the host when the next one is read."""
    array = np.asarray(leaf)
    if sharding is None:
        return jax.block_until_ready(jax.device_put(array))
    placed = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    return jax.block_until_ready(placed)


def _tensors(
    params: Params, found: Sequence[Entry], dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Key and content of every tensor; a parameter is fetched for the first of its own and dropped after the last."""
    leaves = flatten(params)
    for path, parts in itertools.groupby(found, lambda entry: entry.path):
        yield from _tensors_of(_on_host(leaves[path]), parts, dtype)


def _tensors_of(
    array: np.ndarray, parts: Iterable[Entry], dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    for entry in parts:
        part = array if entry.layer is None else array[entry.layer]
        yield entry.key, np.asarray(to_theirs(part, entry.form), dtype, order="C")


def _on_host(leaf: Any) -> np.ndarray:
    """A whole parameter, of which the leaf itself keeps no copy; if hosts divide it, all of them call this."""
    gc.collect(0)  # JAX drops what it gave to NumPy with Python's garbage, and no sooner
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return multihost_utils.process_allgather(leaf, tiled=True)
    parts = [shard.data for shard in leaf.addressable_shards]
    # An array keeps what it gave to NumPy, and this one is not kept.
    return np.asarray(jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts))


def _divided(sizes: Mapping[str, int], limit: int, stem: str) -> dict[str, list[str]]:
    """The tensors' keys by file, in their order; one file if that is enough."""
    shards: list[list[str]] = [[]]
    total = 0
    for key, size in sizes.items():
        if shards[-1] and total + size > limit:
            shards.append([])
            total = 0
        shards[-1].append(key)
        total += size
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    count = len(shards)
    return {f"{stem}-{i:05d}-of-{count:05d}.safetensors": keys for i, keys in enumerate(shards, 1)}


@contextlib.contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A directory whose files, once they are written, replace the config and all weights in `directory`.

    Some readers look for a single file first and others for an index. At any moment either finds old weights or new
    ones, but for one: new shards may have the names of old ones, so between the two there is no index.
    """
    unfinished = directory / "weights.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        new = {path.name for path in unfinished.iterdir()}
        old = {path.name for path in directory.iterdir() if _WEIGHTS.fullmatch(path.name)}
        for name in filter(_is_index, old & new):
            (directory / name).unlink()
        for name in sorted(new, key=lambda name: (_is_index(name), name)):
            (unfinished / name).replace(directory / name)
        for name in sorted(old - new, key=_is_index, reverse=True):
            (directory / name).unlink()
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_index(name: str) -> bool:
    return ".safetensors.index" in name


def _write_json(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return path


def _taps_aside(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Files of different ages hold the same layer as a linear one or as a 1x1 convolution."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _in_files(directory: Path) -> Iterator[tuple[str, _InFile]]:
    for file in _files(directory):
        handle = _opened(file)
        for key in handle.keys():  # noqa: SIM118  (not a dict)
            yield key, _InFile(file, handle, key)


def _files(directory: Path) -> list[Path]:
    """The safetensors files of the first kind that the directory has."""
    candidates = [
        f"{stem}{kind}"
        for kinds in (
            (".safetensors", _INDEX),
            (".fp16.safetensors", _FP16_INDEX),
        )
        for stem in STEMS
        for kind in kinds
    ]
    for name in candidates:
        if (directory / name).is_file():
            path = directory / name
            return _indexed(path) if path.suffix == ".json" else [path]
    looked = ", ".join(candidates)
    raise FileNotFoundError(
        f"no weights in {directory}: looked for {looked}; {_content(directory)}"
    )


def _indexed(index: Path) -> list[Path]:
    content = read_json(index)
    with naming(index):
        weight_map = typed(content, {"weight_map": (dict, {})})["weight_map"]
        files = typed(weight_map, dict.fromkeys(weight_map, (str, None)))
    shards = sorted(set(files.values()))
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise FileNotFoundError(f"{index} lists shards that are not there: {_listed(absent)}")
    return [index.parent / shard for shard in shards]


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except Exception as error:  # safetensors' own class, which it does not always export
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from None


def _content(directory: Path) -> str:
    if not directory.is_dir():
        return "there is no such directory"
    return f"there is {', '.join(sorted(path.name for path in directory.iterdir())) or 'nothing'}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
