"""Files that torch.save wrote, read without torch, and without running what they ask for.

Since torch 1.6 such a file is a zip archive of a pickle and of the bytes of every storage; before, it was pickles one
after the other, and then the bytes. A pickle can ask for any function to be called; here it gets those alone that a
dict of tensors is made by.
"""

import collections
import io
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np

ARCHIVE = b"PK\x03\x04"
MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file that is no archive
DTYPES = {
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ShortStorage": "int16",
}


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a `state_dict`, by their names; of a parameter, the tensor that it is.

    Raises FileNotFoundError, and ValueError for a file that is damaged or that holds anything but a dict of tensors.
    """
    with open(path, "rb") as file:
        start = file.read(len(ARCHIVE))
        file.seek(0)
        try:
            return _of_archive(file) if start == ARCHIVE else _of_stream(file)
        except Exception as error:  # of any class, where a pickle is broken
            raise ValueError(
                f"{path} is not a dict of tensors as torch.save writes it: {error}"
            ) from None


class _Storage(NamedTuple):
    """Values in a row, which the file has under `key`."""

    key: str
    dtype: np.dtype


class _View(NamedTuple):
    """A tensor: where it starts in its storage, and how far the next value is along each dim."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _view(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _View:
    return _View(storage, offset, tuple(shape), tuple(strides))


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _view,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch._utils", "_rebuild_parameter"): lambda view, *_: view,
}


class _Unpickler(pickle.Unpickler):
    """Knows dicts, tensors and storages; `storages` has all that were named, by their keys."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return np.dtype(DTYPES[name])
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise ValueError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, _, *part = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(part):
            raise ValueError(f"it asks for a {kind} that is no storage by itself")
        self.storages[key] = _Storage(key, dtype)
        return self.storages[key]


def _of_archive(file: io.BufferedIOBase) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        root = next((name[:-8] for name in names if name.endswith("data.pkl")), "")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        with archive.open(f"{root}data.pkl") as pickled:
            content = _Unpickler(pickled).load()
        return _arrays(content, lambda storage: archive.read(f"{root}data/{storage.key}"))


def _of_stream(file: io.BufferedIOBase) -> dict[str, np.ndarray]:
    if _Unpickler(file).load() != MAGIC:
        raise ValueError("it starts otherwise")
    for _ in ("version", "machine"):
        _Unpickler(file).load()
    content = (unpickler := _Unpickler(file)).load()
    stored = {}
    for key in _Unpickler(file).load():
        count, storage = int.from_bytes(file.read(8), "little"), unpickler.storages[key]
        stored[storage] = file.read(count * storage.dtype.itemsize)
    return _arrays(content, stored.__getitem__)


def _arrays(content: Any, stored: Callable[[_Storage], bytes]) -> dict[str, np.ndarray]:
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}")
    for name, view in content.items():
        if not isinstance(view, _View):
            raise ValueError(f"{name!r} is a {type(view).__name__}")
    return {name: _array(view, stored(view.storage)) for name, view in content.items()}


def _array(view: _View, stored: bytes) -> np.ndarray:
    values = np.frombuffer(stored, view.storage.dtype)
    if 0 in view.shape:
        return np.empty(view.shape, values.dtype)
    reach = [(size - 1) * step for size, step in zip(view.shape, view.strides, strict=True)]
    if min(view.offset, 0, *reach) < 0 or view.offset + sum(reach) >= len(values):
        raise ValueError(f"a tensor {list(view.shape)} is not within its {len(values)} values")
    strides = [step * values.itemsize for step in view.strides]
    return np.lib.stride_tricks.as_strided(values[view.offset :], view.shape, strides)
