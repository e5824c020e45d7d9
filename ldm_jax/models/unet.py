"""The text-conditioned UNet of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), laid out as diffusers'.

Attributes carry diffusers' names, so parameter paths translate mechanically (`models/names.py`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float

from ldm_jax.models.unet_attention import JointAttention, StackedKeysValues, Transformer
from ldm_jax.models.unet_config import DEEPFLOYD, EPSILON, UNetConfig
from ldm_jax.nn.layers import (
    MLP,
    Downsample,
    KeysValues,
    Map,
    Mask,
    ResBlock,
    Upsample,
    conv3x3,
    sinusoids,
    zeros,
)
from ldm_jax.nn.norms import GroupNorm
from ldm_jax.nn.stack import rematerialised
from ldm_jax.types import Arr, Cond, Latent, PerExample

Text = Iterator[StackedKeysValues | KeysValues]


class UNetContext(NamedTuple):
    """What a UNet prepares once per prompt; every array has the batch first.

    `text` holds the keys and values of the text for each attention, in the order that the network
    meets them, and `added` what is added to the embedded time.
    """

    text: tuple[StackedKeysValues | KeysValues, ...]
    mask: Mask
    added: Float[Arr, "B T"] | None
    concat: Latent | None


class Level(nnx.Module):
    """Residual blocks of one resolution, each followed by attention."""

    def __init__(
        self, inputs: list[int], outputs: int, depth: int, config: UNetConfig, rngs: nnx.Rngs
    ) -> None:
        self.resnets = nnx.List([_res_block(width, outputs, config, rngs) for width in inputs])
        self.attentions = nnx.List(
            [_attention(outputs, depth, config, rngs) for _ in inputs] if depth else []
        )
        self.remat = config.remat

    def layer(
        self,
        i: int,
        x: Map,
        time: Float[Arr, "B T"],
        text: Text,
        mask: Mask,
    ) -> Map:
        """The i-th residual block and its attention, which takes the next of `text`."""
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
        self.downsamplers = nnx.List([] if is_last else [_resampler("down", outputs, config, rngs)])

    def __call__(self, x: Map, time: Float[Arr, "B T"], text: Text, mask: Mask) -> list[Map]:
        """Every result on the way, which the way up takes back."""
        kept = []
        for i in range(len(self.resnets)):
            kept.append(x := self.layer(i, x, time, text, mask))
        return kept + [_resampled(downsample, x, time) for downsample in self.downsamplers]


class MidBlock(Level):
    """The middle: attention between two residual blocks, one residual block alone, or nothing."""

    def __init__(self, width: int, config: UNetConfig, rngs: nnx.Rngs) -> None:
        inputs = [] if config.mid_depth is None else [width]
        super().__init__(inputs, width, config.mid_depth or 0, config, rngs)
        if config.mid_depth:
            self.resnets.append(_res_block(width, width, config, rngs))

    def __call__(self, x: Map, time: Float[Arr, "B T"], text: Text, mask: Mask) -> Map:
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
        self.upsamplers = nnx.List([] if is_last else [_resampler("up", outputs, config, rngs)])

    def __call__(
        self,
        x: Map,
        kept: list[Map],
        time: Float[Arr, "B T"],
        text: Text,
        mask: Mask,
    ) -> Map:
        for i in range(len(self.resnets)):
            x = self.layer(i, jnp.concatenate([x, kept.pop()], axis=-1), time, text, mask)
        for upsample in self.upsamplers:
            x = _resampled(upsample, x, time)
        return x


class UNet(nnx.Module):
    """A noisy latent, the time, and a text -> what the network predicts, of the latent's shape.

    Latents are `[B, H, W, in_channels]`, or fewer channels where `cond.concat` brings the rest; their
    rows and columns are multiples of 2^(levels - 1).
    """

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs) -> None:
        channels, depths, dtype = config.channels, config.transformer_depth, config.dtype
        time = config.time_width
        last = len(channels) - 1
        self.conv_in = conv3x3(config.in_channels, channels[0], dtype=dtype, rngs=rngs)
        self.time_embedding = MLP(channels[0], time, time, dtype=dtype, rngs=rngs)
        if config.pooled_width:
            self.add_embedding = MLP(config.added_width, time, time, dtype=dtype, rngs=rngs)
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
        """The keys and values of the text, for all attentions; once per prompt when sampling.

        Raises ValueError where the network is conditioned by `pooled` and `sizes` and `cond` lacks them.
        """
        levels = [*self.down_blocks, self.mid_block, *self.up_blocks]
        text = tuple(
            attention.prepare(cond.tokens) for level in levels for attention in level.attentions
        )
        return UNetContext(text, cond.mask, self._added(cond), cond.concat)

    def _added(self, cond: Cond) -> Float[Arr, "B T"] | None:
        """SDXL's added conditioning (Podell et al. 2023, arXiv:2307.01952, section 2.2)."""
        if not self.config.pooled_width:
            return None
        if cond.pooled is None or cond.sizes is None:
            raise ValueError(
                "this UNet is conditioned by the pooled text and by six sizes (pooled_width is "
                f"{self.config.pooled_width}); the prompts have no cond.pooled or no cond.sizes"
            )
        sizes = sinusoids(cond.sizes.reshape(-1), self.config.size_width)
        sizes = rearrange(sizes, "(B six) T -> B (six T)", six=6)
        return self.add_embedding(jnp.concatenate([cond.pooled, sizes], axis=-1))

    def __call__(self, x: Latent, told: PerExample, context: UNetContext) -> Latent:
        """`told` is the time as the training schedule tells it, 0...999 for Stable Diffusion; float32 out."""
        if context.concat is not None:
            x = jnp.concatenate([x, context.concat], axis=-1)
        time = self.time_embedding(sinusoids(told, self.config.channels[0]))
        time = nnx.silu(time if context.added is None else time + context.added)
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


def _attention(
    width: int, depth: int, config: UNetConfig, rngs: nnx.Rngs
) -> Transformer | JointAttention:
    if config.blocks == DEEPFLOYD:
        return JointAttention(width, config, rngs)
    return Transformer(width, depth, config, rngs)


def _resampler(
    way: str, width: int, config: UNetConfig, rngs: nnx.Rngs
) -> ResBlock | Downsample | Upsample:
    if config.blocks == DEEPFLOYD:
        return _res_block(width, width, config, rngs, resample=way)
    if way == "down":
        return Downsample(width, (1, 1), dtype=config.dtype, rngs=rngs)
    return Upsample(width, dtype=config.dtype, rngs=rngs)


def _resampled(resampler: nnx.Module, x: Map, time: Float[Arr, "B T"]) -> Map:
    return resampler(x, time) if isinstance(resampler, ResBlock) else resampler(x)


def _res_block(
    inputs: int, outputs: int, config: UNetConfig, rngs: nnx.Rngs, resample: str = "none"
) -> ResBlock:
    return ResBlock(
        inputs,
        outputs,
        config.num_groups,
        EPSILON,
        time_width=config.time_width,
        scale_shift=config.blocks == DEEPFLOYD,
        resample=resample,
        dtype=config.dtype,
        rngs=rngs,
    )
