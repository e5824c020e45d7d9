"""What a UNet's pixels attend with: transformers as Stable Diffusion has them, joint attention as DeepFloyd IF has it.

Either prepares the keys and values of the text once per prompt, and takes them back for every image.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float

from ldm_jax.models.unet_config import EPSILON, UNetConfig
from ldm_jax.nn.attention import attention
from ldm_jax.nn.layers import (
    Attention,
    KeysValues,
    Map,
    Mask,
    dense,
    from_heads,
    gelu,
    into_heads,
    linear,
    zeros,
)
from ldm_jax.nn.norms import GroupNorm, LayerNorm
from ldm_jax.nn.placement import gathered, in_parts
from ldm_jax.nn.platform import platform
from ldm_jax.nn.stack import Stack
from ldm_jax.types import TENSOR_AXIS, Arr

TRANSFORMER_EPSILON = 1e-6

StackedKeysValues = tuple[Float[Arr, "B _ L _ _"], Float[Arr, "B _ L _ _"]]


class GEGLU(nnx.Module):
    """A feed-forward layer of four times the width, gated by a GELU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, dtype: str, rngs: nnx.Rngs) -> None:
        self.expand = linear(width, 8 * width, dtype=dtype, rngs=rngs)
        self.contract = linear(4 * width, width, over=(TENSOR_AXIS, None), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Arr, "B N D"]) -> Float[Arr, "B N D"]:
        whole = platform() == "cpu" and not in_parts()
        value, gate = jnp.split(self.expand(x), 2, axis=-1) if whole else self._halves(x)
        return self.contract(value * gelu(gate))

    def _halves(self, x: Float[Arr, "B N D"]) -> list[jax.Array]:
        """Two products by the halves of the kernel: their results are never written side by side."""
        kernels = jnp.split(gathered(self.expand.kernel[...].astype(self.expand.dtype)), 2, axis=-1)
        biases = jnp.split(self.expand.bias[...], 2)
        pairs = zip(kernels, biases, strict=True)
        over = (None, TENSOR_AXIS)
        return [dense(x, kernel, bias, self.expand.dtype, over) for kernel, bias in pairs]


class TransformerBlock(nnx.Module):
    """Attention to the image itself, to the text, and a feed-forward layer; diffusers' BasicTransformerBlock."""

    def __init__(
        self, width: int, text_width: int, num_heads: int, dtype: str, rngs: nnx.Rngs
    ) -> None:
        self.norm1, self.norm2, self.norm3 = (
            LayerNorm(width, epsilon=EPSILON, dtype=dtype, rngs=rngs) for _ in range(3)
        )
        self.attn1 = Attention(width, width, num_heads, dtype=dtype, rngs=rngs)
        self.attn2 = Attention(width, text_width, num_heads, dtype=dtype, rngs=rngs)
        self.ff = GEGLU(width, dtype, rngs)

    def __call__(self, x: Float[Arr, "B N D"], text: KeysValues, mask: Mask) -> Float[Arr, "B N D"]:
        x += self.attn1(self.norm1(x))
        x += self.attn2(self.norm2(x), text, mask)
        return x + self.ff(self.norm3(x))


class Transformer(nnx.Module):
    """`depth` transformer blocks on the pixels of a map; diffusers' Transformer2DModel.

    The last projection starts at zero, so that the whole starts as the identity.
    """

    def __init__(self, width: int, depth: int, config: UNetConfig, rngs: nnx.Rngs) -> None:
        dtype, num_heads = config.dtype, config.heads(width)

        def make_block(rngs: nnx.Rngs) -> TransformerBlock:
            return TransformerBlock(width, config.text_width, num_heads, dtype, rngs)

        self.norm = GroupNorm(width, config.num_groups, TRANSFORMER_EPSILON, dtype=dtype)
        self.proj_in = linear(width, width, dtype=dtype, rngs=rngs)
        self.transformer_blocks = Stack(make_block, depth, rngs, config.remat)
        self.proj_out = linear(width, width, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def prepare(self, tokens: Float[Arr, "B L E"]) -> StackedKeysValues:
        k, v = self.transformer_blocks.map(lambda block: block.attn2.keys_values(tokens))
        return jnp.moveaxis(k, 0, 1), jnp.moveaxis(v, 0, 1)

    def __call__(self, x: Map, text: StackedKeysValues, mask: Mask) -> Map:
        def call(
            block: TransformerBlock, h: Float[Arr, "B N D"], text: KeysValues
        ) -> tuple[Float[Arr, "B N D"], None]:
            return block(h, text, mask), None

        by_layer = tuple(jnp.moveaxis(array, 1, 0) for array in text)
        h_BND = self.proj_in(rearrange(self.norm(x), "B H W D -> B (H W) D"))
        h_BND, _ = self.transformer_blocks.scan(call, h_BND, by_layer)
        return x + self.proj_out(h_BND).reshape(x.shape)


class JointAttention(nnx.Module):
    """Attention of the pixels of a map to the text and to themselves at once; diffusers' AttnAddedKVProcessor.

    The last projection starts at zero, so that the whole starts as the identity.
    """

    def __init__(self, width: int, config: UNetConfig, rngs: nnx.Rngs) -> None:
        dtype, text_width = config.dtype, config.text_width
        self.group_norm = GroupNorm(width, config.num_groups, EPSILON, dtype=dtype)
        self.to_q, self.to_k, self.to_v = (
            linear(width, width, dtype=dtype, rngs=rngs) for _ in range(3)
        )
        self.add_k_proj, self.add_v_proj = (
            linear(text_width, width, dtype=dtype, rngs=rngs) for _ in range(2)
        )
        self.to_out = linear(width, width, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.num_heads = config.heads(width)

    def prepare(self, tokens: Float[Arr, "B L E"]) -> KeysValues:
        layers = self.add_k_proj, self.add_v_proj
        return tuple(into_heads(layer, tokens, self.num_heads) for layer in layers)

    def __call__(self, x: Map, text: KeysValues, mask: Mask) -> Map:
        h_BND = rearrange(self.group_norm(x), "B H W D -> B (H W) D")
        q, *own = (
            into_heads(layer, h_BND, self.num_heads) for layer in (self.to_q, self.to_k, self.to_v)
        )
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(text, own, strict=True))
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, h_BND.shape[1])), constant_values=True)
        return x + from_heads(self.to_out, attention(q, k, v, mask=mask)).reshape(x.shape)
