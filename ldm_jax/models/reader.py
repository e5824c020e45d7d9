"""A small network that reads a scene's attributes off its picture.

It stands where TIFA (Hu et al. 2023, arXiv 2303.11897) has a visual question answering model: it answers
multiple-choice questions about an image. What its outputs mean is the business of who trained it.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from ldm_jax.models.json_files import check_known, fields_of, typed
from ldm_jax.nn.attention import attention
from ldm_jax.nn.layers import linear
from ldm_jax.nn.norms import GroupNorm
from ldm_jax.settings.schema import check_name
from ldm_jax.types import Images

CLASS = {"_class_name": "Reader"}
DTYPES = ("float32", "bfloat16", "float16")
EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
    """The reader's architecture.

    Attributes:
      size: rows and columns of the images it reads, a multiple of the product of the strides.
      channels, strides: of each convolution.
      asked: (subjects, logits) of each group of subjects: what is asked of each subject of a group is the same.
      dtype: compute dtype; parameters are float32.
    """

    size: int = 64
    channels: tuple[int, ...] = (32, 64, 96, 96)
    strides: tuple[int, ...] = (2, 2, 2, 1)
    asked: tuple[tuple[int, int], ...] = ((1, 2),)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.strides):
            raise ValueError(
                f"channels {self.channels} and strides {self.strides} are by convolution and must be of one length"
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ReaderConfig":
        """The config as its `config.json` has it."""
        fields = {**fields_of(cls), "dtype": (str, "float32")}
        check_known(config, {**CLASS, **fields}, "the reader")
        known = typed(config, fields)
        check_name(known["dtype"], DTYPES, "dtype")
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {**CLASS, **dataclasses.asdict(self)}


class Reader(nnx.Module):
    """Images to logits: 3x3 convolutions, then each subject looks for itself in the map, by attention.

    A subject is a learned query, and what it finds goes through layers that all subjects of its group share: how a
    colour looks is learned once, not once for every kind of object.
    """

    def __init__(self, config: ReaderConfig, rngs: nnx.Rngs) -> None:
        widths, width = (3, *config.channels), config.channels[-1]
        kinds = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.convs = nnx.List(
            nnx.Conv(i, o, (3, 3), strides=stride, padding=1, **kinds)
            for (i, o), stride in zip(itertools.pairwise(widths), config.strides, strict=True)
        )
        self.norms = nnx.List(GroupNorm(o, 8, EPSILON, dtype=config.dtype) for o in config.channels)
        side = config.size
        for stride in config.strides:
            side //= stride
        normal = nnx.initializers.normal(1.0)
        subjects = sum(count for count, _ in config.asked)
        self.places = nnx.Param(normal(rngs.params(), (side * side, width)))
        self.subjects = nnx.Param(normal(rngs.params(), (subjects, width)))
        self.key, self.value = (linear(width, width, **kinds) for _ in range(2))
        self.hidden = nnx.List(linear(width, width, **kinds) for _ in config.asked)
        self.out = nnx.List(linear(width, logits, **kinds) for _, logits in config.asked)
        self.counts = tuple(count for count, _ in config.asked)

    def __call__(self, images: Images) -> Float[Array, "B outputs"]:
        """Logits, float32, of images in [-1, 1]: subject after subject."""
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.silu(norm(conv(x)))
        x_BND = rearrange(x, "B H W D -> B (H W) D") + self.places[...].astype(x.dtype)[None]
        query_BQKD = jnp.repeat(self.subjects[...].astype(x.dtype)[None, :, None], len(x), axis=0)
        key_BNKD, value_BNKD = (layer(x_BND)[:, :, None] for layer in (self.key, self.value))
        found_BQD = attention(query_BQKD, key_BNKD, value_BNKD)[:, :, 0]
        logits, first = [], 0
        for count, hidden, out in zip(self.counts, self.hidden, self.out, strict=True):
            group_BQD = found_BQD[:, first : first + count]
            answers = out(jax.nn.silu(hidden(group_BQD)))
            logits.append(rearrange(answers, "B Q O -> B (Q O)"))
            first += count
        return jnp.concatenate(logits, axis=1).astype(jnp.float32)
