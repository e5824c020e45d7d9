"""Weights in and out: directories as diffusers and transformers write them, read and written by one table of names."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (teaches NumPy, and so safetensors, bfloat16)
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ldm_jax.models.names import Entry, Names, current_key, entries, flatten, to_ours, to_theirs
from ldm_jax.types import Params

STEMS = ("diffusion_pytorch_model", "model")
DTYPES = ("float32", "float16")
NAMED = 5  # tensors that an error message names before it only counts


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The content of `config.json`. Raises FileNotFoundError, or ValueError where it is not JSON."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no config.json; {_content(Path(directory))}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def load(
    directory: str | os.PathLike, like: Params, names: Names, *, shardings: Any = None
) -> Params:
    """The parameters in `directory`, with the structure, shapes and dtypes of `like` (ShapeDtypeStructs will do).

    `shardings`, a tree like `like`, places each parameter on the devices as soon as it is read, so that the host holds
    one parameter at a time. Full precision is preferred where the directory also has an fp16 variant.

    Raises FileNotFoundError without a file of weights, ValueError for a tensor that is missing, left over or of
    another shape.
    """
    stored = _Stored(Path(directory), names)
    expected = entries(like, names)
    stored.check(expected)
    groups: dict[str, list[Entry]] = {}
    for entry in expected:
        groups.setdefault(entry.path, []).append(entry)
    leaves, treedef = jax.tree.flatten(like)
    places = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    placed = [
        jax.device_put(stored.read(groups[path], leaf.dtype), place)
        for path, leaf, place in zip(flatten(like), leaves, places, strict=True)
    ]
    return jax.tree.unflatten(treedef, placed)


def save(
    directory: str | os.PathLike,
    params: Params,
    names: Names,
    config: Mapping[str, Any],
    *,
    dtype: str = "float32",
) -> None:
    """Writes `config.json` and one safetensors file, which `from_pretrained` of the class named in `config` opens.

    `config` is what the network's `to_diffusers` or `to_transformers` gives; `dtype` is float32 or float16.
    A file that was there stays whole until the new one is.
    """
    if dtype not in DTYPES:
        raise ValueError(f"weights can be saved as {' or '.join(DTYPES)}, not as {dtype!r}")
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    tensors = {}
    for entry in entries(params, names):
        array = flat[entry.path] if entry.layer is None else flat[entry.path][entry.layer]
        tensors[entry.key] = np.asarray(to_theirs(array, entry.form), dtype, order="C")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stem = STEMS[0] if "_class_name" in config else STEMS[1]
    text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    _replace(directory / "config.json", lambda path: path.write_text(text))
    metadata = {"format": "pt"}  # transformers refuses a file without it
    file = directory / f"{stem}.safetensors"
    _replace(file, lambda path: save_file(tensors, path, metadata))
    shutil.copymode(directory / "config.json", file)  # save_file lets nobody else read it


def fingerprint(params: Params) -> str:
    """16 hexadecimal digits that identify parameters: a digest of every path, shape and float32 value."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(params).items()):
        array = np.asarray(leaf, np.float32, order="C")
        digest.update(f"{path} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


class _Stored:
    """The tensors that a directory holds, under the keys of an up-to-date file; read one by one."""

    def __init__(self, directory: Path, names: Names) -> None:
        self.directory = directory
        self.tensors: dict[str, tuple[Any, str]] = {}  # the open file, and the key in it
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in _files(directory):
            self._add(_opened(file), names)

    def _add(self, handle: Any, names: Names) -> None:
        for key in handle.keys():  # noqa: SIM118  (not a dict)
            name = current_key(key, names)
            if name in self.tensors and name not in names.tied:
                raise ValueError(f"{self.directory} has two tensors for {name}; the other is {key}")
            if name is not None:
                self.tensors[name] = handle, key
                self.shapes[name] = tuple(handle.get_slice(key).get_shape())

    def check(self, expected: list[Entry]) -> None:
        shapes = {entry.key: entry.shape for entry in expected}
        missing = sorted(shapes.keys() - self.shapes.keys())
        leftover = sorted(self.shapes.keys() - shapes.keys())
        reshaped = sorted(
            f"{key} {list(self.shapes[key])}, not {list(shape)}"
            for key, shape in shapes.items()
            if key in self.shapes and _taps_aside(shape) != _taps_aside(self.shapes[key])
        )
        faults = {"lack": missing, "also have": leftover, "have another shape for": reshaped}
        faults = [f"{verb} {_listed(keys)}" for verb, keys in faults.items() if keys]
        if faults:
            raise ValueError(
                f"the weights in {self.directory} do not fit the network: they {', and '.join(faults)}"
            )

    def read(self, parts: list[Entry], dtype: np.dtype) -> np.ndarray:
        """One parameter, from the one tensor that it is or from the tensors of its layers."""
        arrays = [self._read_one(entry, dtype) for entry in parts]
        return arrays[0] if parts[0].layer is None else np.stack(arrays)

    def _read_one(self, entry: Entry, dtype: np.dtype) -> np.ndarray:
        handle, key = self.tensors[entry.key]
        array = handle.get_tensor(key).reshape(entry.shape)
        return to_ours(array, entry.form).astype(dtype)


def _taps_aside(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Files of different ages hold the same layer as a linear one or as a 1x1 convolution."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _files(directory: Path) -> list[Path]:
    """The safetensors files of the first kind that the directory has."""
    candidates = [
        f"{stem}{kind}"
        for kinds in (
            (".safetensors", ".safetensors.index.json"),
            (".fp16.safetensors", ".safetensors.index.fp16.json"),
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
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
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


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    write(unfinished)
    unfinished.replace(path)
