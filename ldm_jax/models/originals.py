"""The files of weights that authors released: which network their tensors make.

They come without a config, which names and shapes tell. Names are those of torch-fidelity and pytorch-fid (Inception),
of the lpips package and torchvision (LPIPS), and of facebookresearch/dinov2.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ldm_jax.models import torch_files
from ldm_jax.models.dinov2 import Dinov2Config
from ldm_jax.models.inception import InceptionConfig
from ldm_jax.models.json_files import naming
from ldm_jax.models.lpips import LPIPSConfig
from ldm_jax.models.networks import KINDS, Kind

Tensors = Mapping[str, np.ndarray]
HEAD_WIDTH = 64  # of all DINOv2 that were released


def described(tensors: Tensors, where: str) -> tuple[Kind, Any]:
    """The kind of network that they are of, and its config.

    Raises ValueError, which says that they are in `where`, if they are of no network, or only of a part.
    """
    for key, (name, config) in KNOWN.items():
        if key not in tensors:
            continue
        try:
            with naming(where):
                return KINDS[name], config(tensors, where)
        except LookupError as error:
            raise ValueError(f"{where} holds {name} in part: it lacks {error}") from None
    names = ", ".join(name for name, _ in KNOWN.values())
    raise ValueError(f"{where} has no tensors by the names that {names} were released with")


def read(file: str | os.PathLike) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors; queries, keys and values, which DINOv2 has in one, are three.

    Raises FileNotFoundError, ValueError as `torch_files.read` does.
    """
    for key, tensor in torch_files.read(file).items():
        if ".attn.qkv." not in key:
            yield key, tensor
            continue
        for name, part in zip(("query", "key", "value"), np.array_split(tensor, 3), strict=True):
            yield key.replace("qkv", name), part


def _shape(tensors: Tensors, key: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor that a config is told by, which has so many dims and is not empty."""
    shape = tensors[key].shape
    if len(shape) != dims or 0 in shape:
        raise ValueError(f"{key} has the shape {list(shape)}; it must have {dims} dims, none empty")
    return shape


def _inception(tensors: Tensors, where: str) -> InceptionConfig:
    return InceptionConfig(32 // _shape(tensors, "Conv2d_1a_3x3.conv.weight", 4)[0])


def _lpips(tensors: Tensors, where: str) -> LPIPSConfig:
    first, second = (_shape(tensors, f"lin{i}.model.1.weight", 4)[1] for i in range(2))
    net, trunk = ("alex", "AlexNet") if second == 3 * first else ("vgg", "VGG16")
    if not any(key.startswith(("features.", "net.")) for key in tensors):
        raise ValueError(
            f"{where} holds the linear layers of LPIPS alone; give torchvision's file of {trunk} too"
        )
    return LPIPSConfig(net, 64 // first)


def _dinov2(tensors: Tensors, where: str) -> Dinov2Config:
    _, positions, width = _shape(tensors, "pos_embed", 3)
    patch = _shape(tensors, "patch_embed.proj.weight", 4)[-1]
    if width < HEAD_WIDTH:
        raise ValueError(f"pos_embed is {width} wide; it must be at least {HEAD_WIDTH}")
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=sum(key.endswith(".attn.query.weight") for key in tensors),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        use_swiglu_ffn="blocks.0.mlp.w12.weight" in tensors,
    )


# By a tensor that no other network has.
KNOWN: dict[str, tuple[str, Callable[[Tensors, str], Any]]] = {
    "Conv2d_1a_3x3.conv.weight": ("Inception", _inception),
    "lin0.model.1.weight": ("LPIPS", _lpips),
    "blocks.0.attn.query.weight": ("Dinov2Model", _dinov2),
}
