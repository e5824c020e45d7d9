"""A small convolutional classifier that reads a scene's attributes off its picture.

It stands where TIFA (Hu et al. 2023, arXiv 2303.11897) has a visual question answering model: it answers
multiple-choice questions about an image. What its outputs mean is the business of who trained it.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ldm_jax.types import Images


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
    """The reader's architecture.

    Attributes:
      size: rows and columns of the images it reads, a multiple of 2 per stage.
      channels: channels of each stage; every stage halves the resolution.
      outputs: number of logits.
      dtype: compute dtype; parameters are float32.
    """

    size: int = 64
    channels: tuple[int, ...] = (24, 48, 64, 64)
    outputs: int = 2
    dtype: str = "float32"

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ReaderConfig":
        """The config as its `config.json` has it."""
        return cls(**{**config, "channels": tuple(config["channels"])})


class Reader(nnx.Module):
    """Images to logits: strided 3x3 convolutions, group norms and one linear layer on the last map."""

    def __init__(self, config: ReaderConfig, rngs: nnx.Rngs) -> None:
        widths = (3, *config.channels)
        kinds = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.convs = nnx.List(
            nnx.Conv(i, o, (3, 3), strides=2, padding=1, **kinds)
            for i, o in itertools.pairwise(widths)
        )
        self.norms = nnx.List(nnx.GroupNorm(o, num_groups=8, **kinds) for o in config.channels)
        side = config.size >> len(config.channels)
        self.out = nnx.Linear(side * side * widths[-1], config.outputs, **kinds)

    def __call__(self, images: Images) -> Float[Array, "B outputs"]:
        """Logits, float32, of images in [-1, 1]."""
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.silu(norm(conv(x)))
        return self.out(x.reshape(x.shape[0], -1)).astype(jnp.float32)
