"""The encoder of T5 v1.1 and Flan-T5 (Raffel et al. 2020, arXiv:1910.10683), transformers' T5EncoderModel.

It differs from other transformers in that positions enter as a bias on the attention scores alone, which all blocks
share; scores are not scaled, norms have no mean, and no layer has a bias.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32

from ldm_jax.models import names
from ldm_jax.models.json_files import fields_of, typed
from ldm_jax.nn.attention import attention
from ldm_jax.nn.layers import from_heads, into_heads, linear
from ldm_jax.nn.stack import Stack
from ldm_jax.types import Arr, Tokens

FIXED = {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
DTYPES = ("float32", "bfloat16")

Sequence = Float[Array, "B L D"]
Mask = Bool[Arr, "B L"]
Bias = Float[Array, "1 K L L"]
normal = nnx.initializers.normal


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Fields and their defaults are transformers'.

    `dtype` is that of the products of matrices. Norms, the sums between layers and the result are float32 in any case:
    in a trained network these sums reach tens of thousands, which bfloat16 rounds coarsely and float16 cannot hold,
    so that float16 is refused with a ValueError. Parameters may be stored in bfloat16, at half the room.
    """

    vocab_size: int = 32128  # more than the tokenizer has: rounded up
    d_model: int = 512  # width of a token
    d_kv: int = 64  # width of a head; heads need not divide d_model
    d_ff: int = 2048  # width inside a feed-forward layer
    num_layers: int = 6  # blocks
    num_heads: int = 8  # attention heads
    relative_attention_num_buckets: int = 32  # learned biases, by the distance of two tokens
    relative_attention_max_distance: int = 128  # from here on all distances have one bias
    layer_norm_epsilon: float = 1e-6  # what norms add to the mean square
    dtype: str = "float32"  # of the products of matrices: float32 or bfloat16

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype of T5 is {self.dtype!r}; it can be {', '.join(DTYPES)}")

    @property
    def names(self) -> names.Names:
        """How checkpoints name the parameters."""
        return names.T5

    @classmethod
    def from_transformers(cls, values: Mapping[str, Any], dtype: str = "float32") -> "T5Config":
        """From the content of a `config.json`; what it leaves out has transformers' default.

        Raises ValueError for a network of another kind, such as the first T5, whose feed-forward layers have no gate.
        """
        names.check_fixed({"feed_forward_proj": "relu", **values}, FIXED, "T5EncoderModel")
        return cls(**typed(values, fields_of(cls)), dtype=dtype)

    def to_transformers(self) -> dict[str, Any]:
        """The content of the `config.json` that transformers' T5EncoderModel reads."""
        values = dataclasses.asdict(self)
        del values["dtype"]
        return {"architectures": ["T5EncoderModel"], **FIXED, **values}


class SelfAttention(nnx.Module):
    """Attention with a bias on its scores in place of positions, and without the scale 1/sqrt(A)."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs) -> None:
        width, inner = config.d_model, config.num_heads * config.d_kv
        options = {"use_bias": False, "dtype": config.dtype, "rngs": rngs}
        # The missing scale is in the initial queries.
        self.q = linear(width, inner, kernel_init=normal((width * config.d_kv) ** -0.5), **options)
        self.k = linear(width, inner, kernel_init=normal(width**-0.5), **options)
        self.v = linear(width, inner, kernel_init=normal(width**-0.5), **options)
        self.o = linear(inner, width, kernel_init=normal(inner**-0.5), **options)
        self.num_heads = config.num_heads

    def __call__(self, x_BLD: Sequence, mask: Mask, bias: Bias) -> Sequence:
        q, k, v = (into_heads(layer, x_BLD, self.num_heads) for layer in (self.q, self.k, self.v))
        return from_heads(self.o, attention(q, k, v, mask=mask, bias=bias, scale=1.0))


class GatedGELU(nnx.Module):
    """A feed-forward layer gated by a GELU, in its approximation by tanh (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs) -> None:
        width, inner = config.d_model, config.d_ff
        options = {"use_bias": False, "dtype": config.dtype, "rngs": rngs}
        self.wi_0 = linear(width, inner, kernel_init=normal(width**-0.5), **options)
        self.wi_1 = linear(width, inner, kernel_init=normal(width**-0.5), **options)
        self.wo = linear(inner, width, kernel_init=normal(inner**-0.5), **options)

    def __call__(self, x_BLD: Sequence) -> Sequence:
        return self.wo(nnx.gelu(self.wi_0(x_BLD), approximate=True) * self.wi_1(x_BLD))


class Block(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs) -> None:
        self.attention_norm = _norm(config, rngs)
        self.attention = SelfAttention(config, rngs)
        self.feed_forward_norm = _norm(config, rngs)
        self.feed_forward = GatedGELU(config, rngs)

    def __call__(self, x_BLD: Sequence, mask: Mask, bias: Bias) -> Sequence:
        x_BLD += self.attention(self.attention_norm(x_BLD), mask, bias)
        return x_BLD + self.feed_forward(self.feed_forward_norm(x_BLD))


class T5Encoder(nnx.Module):
    """Tokens of a caption -> a vector each."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs) -> None:
        width, heads = config.d_model, config.num_heads
        num_buckets = config.relative_attention_num_buckets
        self.token_embedding = nnx.Embed(
            config.vocab_size, width, embedding_init=normal(1.0), rngs=rngs
        )
        self.position_bias = nnx.Embed(
            num_buckets, heads, embedding_init=normal(width**-0.5), rngs=rngs
        )
        self.blocks = Stack(lambda rngs: Block(config, rngs), config.num_layers, rngs)
        self.final_norm = _norm(config, rngs)
        self.config = config

    def __call__(self, tokens: Tokens, mask: Mask) -> Float[Array, "B L E"]:
        """Encodes captions after the final norm, in float32.

        `mask` says which tokens are the caption's, its end token included: no token attends to padding. What stands
        at the places of padding is for nobody to read.
        """
        x_BLD = self.token_embedding(tokens).astype(jnp.float32)
        return self.final_norm(self.blocks(x_BLD, mask, self._bias(tokens.shape[1])))

    def _bias(self, length: int) -> Bias:
        position = np.arange(length)
        bucket_LL = relative_buckets(
            position[None] - position[:, None],
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        return rearrange(self.position_bias(bucket_LL), "N L K -> 1 K N L")


def relative_buckets(
    offset: Int[np.ndarray, "*shape"], num_buckets: int, max_distance: int
) -> Int32[np.ndarray, "*shape"]:
    """Which learned bias holds for a key `offset` places behind its query; section 2.1 of the paper.

    One half of the buckets is for keys that come later. In each half, one half is for a distance each, the other for
    ranges of distances whose length grows exponentially up to `max_distance`, and the last for whatever is farther.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    reach = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    ranged = np.minimum(exact + (reach * (half - exact)).astype(np.int32), half - 1)
    bucket = np.where(offset > 0, half, 0) + np.where(distance < exact, distance, ranged)
    return bucket.astype(np.int32)


def _norm(config: T5Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Division by the root mean square (Zhang and Sennrich 2019, arXiv:1910.07467), in float32."""
    return nnx.RMSNorm(
        config.d_model, epsilon=config.layer_norm_epsilon, dtype=jnp.float32, rngs=rngs
    )
