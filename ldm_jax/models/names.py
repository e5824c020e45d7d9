"""Names: our parameter paths <-> the keys of diffusers' and transformers' checkpoints.

Modules carry the attribute names of the network they mirror, so most of a name translates by itself:

    encoder/down_blocks/0/resnets/0/conv1/kernel        encoder.down_blocks.0.resnets.0.conv1.weight
    encoder/layers/block/mlp/fc1/bias, 24 layers        encoder.layers.{0...23}.mlp.fc1.bias

A `block` in a path is an `nn.stack.Stack`: its parameters carry a leading layer axis, and the checkpoint has one
tensor a layer. What does not translate by itself stands in one table per network, a `Names`, which serves reading and
writing alike.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.types import Params

STACK = "block"
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


@dataclasses.dataclass(frozen=True)
class Names:
    """How the tensors of one network are called in its checkpoints, where that is not what the path says.

    renames: (members of our path, members of their key), dots between, leaf left out: ("to_out", "to_out.0").
    pointwise: linear layers here that are 1x1 convolutions there.
    legacy: (regular expression, replacement), which bring a key of an old file up to date.
    unused: regular expressions; keys that mean nothing here, such as stored constants.
    tied: keys that a file may hold twice, the second time under a legacy name.
    """

    renames: tuple[tuple[str, str], ...] = ()
    pointwise: tuple[str, ...] = ()
    legacy: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()


_TO_OUT = ("to_out", "to_out.0")

KL = Names(
    renames=(_TO_OUT,),
    pointwise=("conv_shortcut", "quant_conv", "post_quant_conv"),
    legacy=(
        (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
        (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
        (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
        (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    ),
)

_CLIP_UNUSED = (r"\.position_ids$",)


def _tower(name: str, *members: str) -> Names:
    """One tower in a file of its own, whose keys carry its name; transformers 5 writes them without, and reads both."""
    return Names(
        renames=tuple((member, f"{name}.{member}") for member in members),
        legacy=((rf"^({'|'.join(members)})\.", rf"{name}.\1."),),
        unused=_CLIP_UNUSED,
    )


CLIP_TEXT = _tower("text_model", "embeddings", "encoder", "final_layer_norm")
CLIP_VISION = _tower("vision_model", "embeddings", "pre_layrnorm", "encoder", "post_layernorm")
CLIP = Names(unused=_CLIP_UNUSED)

UNET_LINEAR = Names(
    renames=(_TO_OUT, ("ff.expand", "ff.net.0.proj"), ("ff.contract", "ff.net.2")),
    pointwise=("conv_shortcut",),
)
UNET_CONV = dataclasses.replace(UNET_LINEAR, pointwise=("conv_shortcut", "proj_in", "proj_out"))

PIXART = Names(
    renames=(
        _TO_OUT,
        ("patch_embedding", "pos_embed.proj"),
        ("time_embedding", "adaln_single.emb.timestep_embedder"),
        ("resolution_embedding", "adaln_single.emb.resolution_embedder"),
        ("aspect_ratio_embedding", "adaln_single.emb.aspect_ratio_embedder"),
        ("modulation", "adaln_single.linear"),
        ("ff.linear_1", "ff.net.0.proj"),
        ("ff.linear_2", "ff.net.2"),
    ),
    unused=(r"^caption_projection\.y_embedding$",),  # the empty text; samplers encode it themselves
)

T5 = Names(
    renames=(
        ("token_embedding", "shared"),
        ("position_bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        ("blocks", "encoder.block"),
        ("attention_norm", "layer.0.layer_norm"),
        ("attention", "layer.0.SelfAttention"),
        ("feed_forward_norm", "layer.1.layer_norm"),
        ("feed_forward", "layer.1.DenseReluDense"),
        ("final_norm", "encoder.final_layer_norm"),
    ),
    legacy=((r"^encoder\.embed_tokens\.", "shared."),),
    unused=(r"^decoder\.", r"^lm_head\."),  # of the whole T5
    tied=("shared.weight",),
)


class Entry(NamedTuple):
    """One tensor of a checkpoint, and the parameter, or the layer of a stacked parameter, that it is."""

    key: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    form: str  # "kernel": [..., in, out] here, [out, in, ...] there; "pointwise": there with 1x1 taps; "same"


def entries(params: Params, names: Names) -> list[Entry]:
    """Every tensor that a checkpoint of `params` (arrays or ShapeDtypeStructs) has.

    Raises ValueError if two parameters claim one key.
    """
    found = [
        entry
        for path, leaf in flatten(params).items()
        for entry in _entries(path, leaf.shape, names)
    ]
    owners: dict[str, str] = {}
    for entry in found:
        if entry.key in owners:
            raise ValueError(
                f"{owners[entry.key]} and {entry.path} are both called {entry.key} in a checkpoint"
            )
        owners[entry.key] = entry.path
    return found


def flatten(params: Params) -> dict[str, Any]:
    """{"encoder/conv_in/kernel": leaf, ...}"""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def current_key(key: str, names: Names) -> str | None:
    """The key that an up-to-date file would use for `key`; None if it means nothing here."""
    if any(re.search(pattern, key) for pattern in names.unused):
        return None
    for pattern, replacement in names.legacy:
        key = re.sub(pattern, replacement, key)
    return key


def to_theirs(array: np.ndarray, form: str) -> np.ndarray:
    """A parameter (one layer of it) in the checkpoint's layout."""
    if form == "same":
        return array
    array = np.moveaxis(array, (-1, -2), (0, 1))
    return array[..., None, None] if form == "pointwise" else array


def to_ours(array: np.ndarray, form: str) -> np.ndarray:
    """The inverse of `to_theirs`."""
    if form == "same":
        return array
    array = array[..., 0, 0] if form == "pointwise" else array
    return np.moveaxis(array, (0, 1), (-1, -2))


def check_fixed(values: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a choice in a config that a network here does not have.

    `fixed` holds what is built in; what the config leaves out is taken to be that.
    """
    for name, built_in in fixed.items():
        given = values.get(name, built_in)
        if given != built_in:
            raise ValueError(
                f"{where} with {name}={given!r} is not supported; only {name}={built_in!r} is"
            )


def _entries(path: str, shape: tuple[int, ...], names: Names) -> Iterator[Entry]:
    *members, leaf = path.split("/")
    form = _form(members, leaf, names)
    if STACK not in members:
        yield Entry(_key(members, leaf, names), _their_shape(shape, form), path, None, form)
        return
    at = members.index(STACK)
    for layer in range(shape[0]):
        named = [*members[:at], str(layer), *members[at + 1 :]]
        yield Entry(_key(named, leaf, names), _their_shape(shape[1:], form), path, layer, form)


def _form(members: list[str], leaf: str, names: Names) -> str:
    if leaf != "kernel":
        return "same"
    return "pointwise" if members[-1] in names.pointwise else "kernel"


def _key(members: list[str], leaf: str, names: Names) -> str:
    key = ".".join([*members, LEAVES.get(leaf, leaf)])
    for ours, theirs in names.renames:
        key = re.sub(rf"(?<![^.]){re.escape(ours)}(?![^.])", theirs, key)
    return key


def _their_shape(shape: tuple[int, ...], form: str) -> tuple[int, ...]:
    return to_theirs(np.broadcast_to(np.zeros(()), shape), form).shape
