"""The text-conditioned UNet of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), laid out as diffusers'.

Attributes carry diffusers' names, so parameter paths translate mechanically (`models/names.py`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Bool, Float

from ldm_jax.models.unet_config import EPSILON, UNetConfig
from ldm_jax.nn.attention import attention
from ldm_jax.nn.layers import (
    Downsample,
    GroupNorm,
    Map,
    ResBlock,
    TimeEmbedding,
    Upsample,
    conv3x3,
    linear,
    zeros,
)
from ldm_jax.nn.stack import Stack, rematerialised
from ldm_jax.types import Arr, Cond, Latent, PerExample

TRANSFORMER_EPSILON = 1e-6

Mask = Bool[Arr, "B L"] | None
KeysValues = tuple[Float[Arr, "B L _ _"], Float[Arr, "B L _ _"]]
StackedKeysValues = tuple[Float[Arr, "B _ L _ _"], Float[Arr, "B _ L _ _"]]


class UNetContext(NamedTuple):
    """What a UNet prepares once per prompt; every array has the batch first.

    `text` holds the keys and values of the text for each transformer, in the order that the
    network meets them.
    """

    text: tuple[StackedKeysValues, ...]
    mask: Mask
    concat: Latent | None


class Attention(nnx.Module):
    """Multi-head attention of `width` to tokens of `source_width`, without biases but for the last."""

    def __init__(
        self, width: int, source_width: int, num_heads: int, dtype: str, rngs: nnx.Rngs
    ) -> None:
        self.to_q = linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_k = linear(source_width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_v = linear(source_width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_out = linear(width, width, dtype=dtype, rngs=rngs)
        self.num_heads = num_heads

    def keys_values(self, source: Float[Arr, "B L E"]) -> KeysValues:
        return self._split(self.to_k(source)), self._split(self.to_v(source))

    def __call__(
        self,
        x: Float[Arr, "B N D"],
        keys_values: KeysValues,
        mask: Mask = None,
    ) -> Float[Arr, "B N D"]:
        out_BNKA = attention(self._split(self.to_q(x)), *keys_values, mask=mask)
        return self.to_out(rearrange(out_BNKA, "B N K A -> B N (K A)"))

    def _split(self, x: Float[Arr, "B L D"]) -> Float[Arr, "B L K A"]:
        return rearrange(x, "B L (K A) -> B L K A", K=self.num_heads)


class GEGLU(nnx.Module):
    """A feed-forward layer of four times the width, gated by a GELU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, dtype: str, rngs: nnx.Rngs) -> None:
        self.expand = linear(width, 8 * width, dtype=dtype, rngs=rngs)
        self.contract = linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Arr, "B N D"]) -> Float[Arr, "B N D"]:
        value, gate = jnp.split(self.expand(x), 2, axis=-1)
        return self.contract(value * nnx.gelu(gate, approximate=False))


class TransformerBlock(nnx.Module):
    """Attention to the image itself, to the text, and a feed-forward layer; diffusers' BasicTransformerBlock."""

    def __init__(
        self, width: int, text_width: int, num_heads: int, dtype: str, rngs: nnx.Rngs
    ) -> None:
        self.norm1, self.norm2, self.norm3 = (
            nnx.LayerNorm(width, epsilon=EPSILON, dtype=dtype, rngs=rngs) for _ in range(3)
        )
        self.attn1 = Attention(width, width, num_heads, dtype, rngs)
        self.attn2 = Attention(width, text_width, num_heads, dtype, rngs)
        self.ff = GEGLU(width, dtype, rngs)

    def __call__(self, x: Float[Arr, "B N D"], text: KeysValues, mask: Mask) -> Float[Arr, "B N D"]:
        h = self.norm1(x)
        x += self.attn1(h, self.attn1.keys_values(h))
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


class Level(nnx.Module):
    """Residual blocks of one resolution, each followed by a transformer."""

    def __init__(
        self, inputs: list[int], outputs: int, depth: int, config: UNetConfig, rngs: nnx.Rngs
    ) -> None:
        self.resnets = nnx.List([_res_block(width, outputs, config, rngs) for width in inputs])
        self.attentions = nnx.List(
            [Transformer(outputs, depth, config, rngs) for _ in inputs] if depth else []
        )
        self.remat = config.remat

    def layer(
        self,
        i: int,
        x: Map,
        time: Float[Arr, "B T"],
        text: Iterator[StackedKeysValues],
        mask: Mask,
    ) -> Map:
        """The i-th residual block and its transformer, which takes the next of `text`."""
        x = rematerialised(self.resnets[i].__call__, self.remat)(x, time)
        return self.attentions[i](x, next(text), mask) if i < len(self.attentions) else x


class DownBlock(Level):
    """One level on the way down."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        depth: int,
        is_last: bool,
        config: UNetConfig,
        rngs: nnx.Rngs,
    ) -> None:
        widths = [inputs] + [outputs] * (config.num_res_blocks - 1)
        super().__init__(widths, outputs, depth, config, rngs)
        samplers = [] if is_last else [Downsample(outputs, (1, 1), dtype=config.dtype, rngs=rngs)]
        self.downsamplers = nnx.List(samplers)

    def __call__(
        self, x: Map, time: Float[Arr, "B T"], text: Iterator[StackedKeysValues], mask: Mask
    ) -> list[Map]:
        """Every result on the way, which the way up takes back."""
        kept = []
        for i in range(len(self.resnets)):
            kept.append(x := self.layer(i, x, time, text, mask))
        return kept + [downsample(x) for downsample in self.downsamplers]


class MidBlock(Level):
    """The middle: a transformer between two residual blocks, or one residual block alone."""

    def __init__(self, width: int, config: UNetConfig, rngs: nnx.Rngs) -> None:
        super().__init__([width], width, config.mid_depth, config, rngs)
        if config.mid_depth:
            self.resnets.append(_res_block(width, width, config, rngs))

    def __call__(
        self, x: Map, time: Float[Arr, "B T"], text: Iterator[StackedKeysValues], mask: Mask
    ) -> Map:
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time, text, mask)
        return x


class UpBlock(Level):
    """One level on the way up, which takes back what the way down kept, last first."""

    def __init__(
        self,
        inputs: int,
        skips: list[int],
        outputs: int,
        depth: int,
        is_last: bool,
        config: UNetConfig,
        rngs: nnx.Rngs,
    ) -> None:
        before = [inputs] + [outputs] * (len(skips) - 1)
        widths = [width + skip for width, skip in zip(before, skips, strict=True)]
        super().__init__(widths, outputs, depth, config, rngs)
        samplers = [] if is_last else [Upsample(outputs, dtype=config.dtype, rngs=rngs)]
        self.upsamplers = nnx.List(samplers)

    def __call__(
        self,
        x: Map,
        kept: list[Map],
        time: Float[Arr, "B T"],
        text: Iterator[StackedKeysValues],
        mask: Mask,
    ) -> Map:
        for i in range(len(self.resnets)):
            x = self.layer(i, jnp.concatenate([x, kept.pop()], axis=-1), time, text, mask)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class UNet(nnx.Module):
    """A noisy latent, the time, and a text -> what the network predicts, of the latent's shape.

    Latents are `[B, H, W, in_channels]`, or fewer channels where `cond.concat` brings the rest; their
    rows and columns are multiples of 2^(levels - 1).
    """

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs) -> None:
        channels, depths, dtype = config.channels, config.transformer_depth, config.dtype
        last = len(channels) - 1
        self.conv_in = conv3x3(config.in_channels, channels[0], dtype=dtype, rngs=rngs)
        self.time_embedding = TimeEmbedding(channels[0], 4 * channels[0], dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List(
            [
                DownBlock(inputs, outputs, depth, i == last, config, rngs)
                for i, (inputs, outputs, depth) in enumerate(
                    zip((channels[0], *channels), channels, depths, strict=False)
                )
            ]
        )
        self.mid_block = MidBlock(channels[-1], config, rngs)
        self.up_blocks = nnx.List(_up_blocks(config, rngs))
        self.conv_norm_out = GroupNorm(channels[0], config.num_groups, EPSILON, dtype=dtype)
        self.conv_out = conv3x3(
            channels[0], config.out_channels, kernel_init=zeros, dtype=dtype, rngs=rngs
        )
        self.config = config

    def prepare(self, cond: Cond) -> UNetContext:
        """The keys and values of the text, for all transformers; once per prompt when sampling."""
        levels = [*self.down_blocks, self.mid_block, *self.up_blocks]
        text = tuple(
            transformer.prepare(cond.tokens) for level in levels for transformer in level.attentions
        )
        return UNetContext(text, cond.mask, cond.concat)

    def __call__(self, x: Latent, told: PerExample, context: UNetContext) -> Latent:
        """`told` is the time as the training schedule tells it, 0...999 for Stable Diffusion; float32 out."""
        if context.concat is not None:
            x = jnp.concatenate([x, context.concat], axis=-1)
        time = nnx.silu(self.time_embedding(told))
        text, mask = iter(context.text), context.mask
        kept = [self.conv_in(x)]
        for block in self.down_blocks:
            kept += block(kept[-1], time, text, mask)
        x = self.mid_block(kept[-1], time, text, mask)
        for block in self.up_blocks:
            x = block(x, kept, time, text, mask)
        return self.conv_out(nnx.silu(self.conv_norm_out(x))).astype(jnp.float32)


def _up_blocks(config: UNetConfig, rngs: nnx.Rngs) -> list[UpBlock]:
    """From the lowest level up; each takes back one more result than it has residual blocks on the way down."""
    channels, num = config.channels, config.num_res_blocks
    skips = [channels[0]]
    for i, width in enumerate(channels):
        skips += [width] * (num + (i < len(channels) - 1))
    blocks, inputs = [], channels[-1]
    for i in reversed(range(len(channels))):
        taken = [skips.pop() for _ in range(num + 1)]
        blocks.append(
            UpBlock(inputs, taken, channels[i], config.transformer_depth[i], i == 0, config, rngs)
        )
        inputs = channels[i]
    return blocks


def _res_block(inputs: int, outputs: int, config: UNetConfig, rngs: nnx.Rngs) -> ResBlock:
    return ResBlock(
        inputs,
        outputs,
        config.num_groups,
        EPSILON,
        time_width=4 * config.channels[0],
        dtype=config.dtype,
        rngs=rngs,
    )
