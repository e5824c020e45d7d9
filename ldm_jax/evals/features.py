"""Features of images by extractor and name, each [n, ...], in memory and in files."""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ldm_jax.files.durable import write_atomically
from ldm_jax.files.typed_json import write_json

Features = Mapping[str, Mapping[str, np.ndarray]]

_DESCRIBED = "described"


def joined(parts: Sequence[Features]) -> Features:
    """Features of parts in their order as those of all. Raises ValueError where there is none."""
    if not parts:
        raise ValueError("there is no image to look at")
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def count_of(features: Features) -> int:
    """Images that these are of."""
    return len(next(iter(next(iter(features.values())).values())))


def write_features(path: epath.PathLike, features: Features, described: Any = None) -> None:
    """One .npz file, whole or not at all; `described`, of what JSON has, is what they are of."""
    arrays = {f"{e}/{name}": x for e, each in features.items() for name, x in each.items()}
    stream = io.BytesIO()
    np.savez(stream, **arrays, **{_DESCRIBED: np.array(write_json(described))})
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, stream.getvalue())


def read_features(path: epath.PathLike) -> tuple[dict[str, dict[str, np.ndarray]], Any]:
    """What `write_features` wrote. Raises FileNotFoundError, or ValueError for another file."""
    try:
        with np.load(io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False) as file:
            arrays = dict(file)
        described = json.loads(str(arrays.pop(_DESCRIBED)))
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no features that ldm_jax wrote: {error}") from error
    features: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        extractor, _, name = key.partition("/")
        features.setdefault(extractor, {})[name] = array
    return features, described
