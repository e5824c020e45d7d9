"""Files that torch.save wrote, read without torch, and without running what they ask for.

Since torch 1.6 such a file is a zip archive of a pickle and of the bytes of every storage; before, it was pickles one
after the other, and then the bytes. A pickle is a program, which can ask for any function to be called, and for more
memory than there is. Here the few instructions are followed that make a dict of tensors, and no others, so that
reading takes no more memory than the file is long, and some 100 bytes for each of the pickle's.
"""

import functools
import io
import os
import pickletools
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np

ARCHIVE = b"PK\x03\x04"
MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file that is no archive
LONGEST = 2**21  # bytes of a pickle that are read; a tensor takes about 150
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


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    if not isinstance(storage, _Storage) or {type(n) for n in (offset, *shape, *strides)} != {int}:
        raise ValueError("it has a tensor without a storage or without a shape")
    return _View(storage, offset, tuple(shape), tuple(strides))


def _dict(pairs: Iterable[Any] = ()) -> dict[str, Any]:
    result = {}
    for key, value in pairs:
        if not isinstance(key, str):  # what holds others would take for ever to be hashed
            raise ValueError(f"it has a {type(key).__name__} for a name")
        result[key] = value
    return result


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _dict,
    ("torch._utils", "_rebuild_tensor"): _view,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch._utils", "_rebuild_parameter"): lambda view, *_: view,
}

# The instructions that put what stands after them onto the stack, and those that put always the same there.
_VALUES = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "BINFLOAT", "STRING", "BINSTRING"),
    *("SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Unpickler:
    """Follows a pickle's instructions by their names in `pickletools`."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}

    def load(self, file: io.BufferedIOBase) -> Any:
        """The object that the next pickle in `file` makes; the file is left behind it."""
        start, data = file.tell(), io.BytesIO(file.read(LONGEST))
        for instruction, argument, _ in pickletools.genops(data):
            self.follow(instruction.name, argument)
        file.seek(start + data.tell())
        return self.stack.pop()

    def follow(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case _ if name in _VALUES:
                stack.append(argument)
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            case _ if name in _TUPLES:
                stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "TUPLE":
                self.marked().append(tuple(stack))
            case "LIST":
                self.marked().append(stack)
            case "APPEND":
                self.extend([stack.pop()])
            case "APPENDS":
                self.marked()
                self.extend(stack)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.update([key, value])
            case "SETITEMS":
                self.marked()
                self.update(stack)
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self.memo[len(self.memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_known(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                called, module = stack.pop(), stack.pop()
                stack.append(_known(module, called))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(stack.pop()(*arguments))
            case "BUILD":  # the versions of modules
                stack.pop()
            case "BINPERSID":
                stack.append(_storage(*stack.pop()))
            case _:
                raise ValueError(f"it has the instruction {name}, which no dict of tensors needs")

    def marked(self) -> list[Any]:
        """The stack under the last mark, which from now on is the stack."""
        self.stack = self.below.pop()
        return self.stack

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError(f"it appends to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise ValueError(f"it sets items of a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(_dict(zip(items[::2], items[1::2], strict=True)))


def _known(module: Any, name: Any) -> Any:
    if module == "torch" and name in DTYPES:
        return np.dtype(DTYPES[name])
    if (module, name) in _KNOWN:
        return _KNOWN[module, name]
    raise ValueError(f"it asks for {module}.{name}")


def _storage(kind: Any, dtype: Any, key: Any, _: Any, __: Any, *part: Any) -> _Storage:
    if (kind, type(key)) != ("storage", str) or not isinstance(dtype, np.dtype) or any(part):
        raise ValueError("it asks for something that is no storage by itself")
    return _Storage(key, dtype)


def _of_archive(file: io.BufferedIOBase) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        _check_sizes(archive, os.fstat(file.fileno()).st_size)
        names = archive.namelist()
        root = next((name[:-8] for name in names if name.endswith("data.pkl")), "")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        content = _Unpickler().load(io.BytesIO(archive.read(f"{root}data.pkl")))
        return _arrays(content, lambda key: archive.read(f"{root}data/{key}"))


def _check_sizes(archive: zipfile.ZipFile, available: int) -> None:
    """Raises ValueError where what is in the archive would take more room than the file does."""
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it is compressed, which no file of torch.save is")
    if (total := sum(member.file_size for member in members)) > available:
        raise ValueError(f"it is to hold {total} bytes, and has {available}")


def _of_stream(file: io.BufferedIOBase) -> dict[str, np.ndarray]:
    if _Unpickler().load(file) != MAGIC:
        raise ValueError("it starts otherwise")
    for _ in ("version", "machine"):
        _Unpickler().load(file)
    content = _Unpickler().load(file)
    dtypes = {view.storage.key: view.storage.dtype for view in _views(content).values()}
    stored = {}
    for key in _Unpickler().load(file):
        count = int.from_bytes(file.read(8), "little")
        stored[key] = _read(file, count * dtypes[key].itemsize)
    return _arrays(content, stored.__getitem__)


def _read(file: io.BufferedIOBase, size: int) -> bytes:
    if size > (left := os.fstat(file.fileno()).st_size - file.tell()):
        raise ValueError(f"it ends {size - left} bytes too soon")
    return file.read(size)


def _views(content: Any) -> dict[str, _View]:
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    for name, view in content.items():
        if not isinstance(view, _View):
            raise ValueError(f"{name!r} is a {type(view).__name__}")
    return content


def _arrays(content: Any, stored: Callable[[str], bytes]) -> dict[str, np.ndarray]:
    """The arrays; those that share a storage share its bytes."""
    stored = functools.cache(stored)
    return {name: _array(view, stored(view.storage.key)) for name, view in _views(content).items()}


def _array(view: _View, stored: bytes) -> np.ndarray:
    values = np.frombuffer(stored, view.storage.dtype)
    if 0 in view.shape:
        return np.empty(view.shape, values.dtype)
    reach = [(size - 1) * step for size, step in zip(view.shape, view.strides, strict=True)]
    if min(view.offset, 0, *reach) < 0 or view.offset + sum(reach) >= len(values):
        raise ValueError(f"a tensor {list(view.shape)} is not within its {len(values)} values")
    strides = [step * values.itemsize for step in view.strides]
    return np.lib.stride_tricks.as_strided(values[view.offset :], view.shape, strides)
