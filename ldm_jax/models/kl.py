"""The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), as diffusers lays it out.

Attributes carry diffusers' names, so parameter paths translate mechanically (`models/names.py`).
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ldm_jax.models import names
from ldm_jax.models.json_files import typed
from ldm_jax.nn.layers import (
    Downsample,
    Map,
    PixelAttention,
    ResBlock,
    Upsample,
    conv3x3,
    linear,
)
from ldm_jax.nn.norms import GroupNorm
from ldm_jax.types import Images, Latent

EPSILON = 1e-6

# Diffusers' names, types and defaults of what a `config.json` holds; then which of our fields have other names.
FIELDS = {
    "in_channels": (int, 3),
    "out_channels": (int, 3),
    "latent_channels": (int, 4),
    "block_out_channels": (tuple[int, ...], (64,)),
    "layers_per_block": (int, 1),
    "norm_num_groups": (int, 32),
    "scaling_factor": (float, 0.18215),
    "shift_factor": (float | None, None),
    "use_quant_conv": (bool, True),
    "sample_size": (int, 32),
}
RENAMED = {"block_out_channels": "channels", "norm_num_groups": "num_groups"}
# What diffusers lets a config choose and this network has built in.
FIXED = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "latents_mean": None,
    "latents_std": None,
}


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """An autoencoder that halves rows and columns `len(channels) - 1` times; defaults are Stable Diffusion's.

    `scaling_factor` and `shift_factor` bring latents to about unit variance; `sample_size`, the side of the images in
    pixels, is what diffusers tiles by; `dtype` is that of the computation.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    sample_size: int = 512
    dtype: str = "float32"

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any], dtype: str = "float32") -> "KLConfig":
        """From the content of a `config.json` of diffusers' AutoencoderKL.

        Raises ValueError where it asks for something that this network does not have.
        """
        names.check_fixed(values, FIXED, "AutoencoderKL")
        given = typed(values, FIELDS, free=["shift_factor"])
        given["shift_factor"] = given["shift_factor"] or 0.0
        fields = {RENAMED.get(name, name): value for name, value in given.items()}
        config = cls(**fields, dtype=dtype)
        follows = ("use_post_quant_conv", "down_block_types", "up_block_types")
        written = config.to_diffusers()
        names.check_fixed(values, {name: written[name] for name in follows}, "AutoencoderKL")
        return config

    def to_diffusers(self) -> dict[str, Any]:
        """The content of the `config.json` that diffusers' AutoencoderKL reads."""
        fields = {name: getattr(self, RENAMED.get(name, name)) for name in FIELDS}
        return {
            "_class_name": "AutoencoderKL",
            **FIXED,
            **fields,
            "shift_factor": self.shift_factor or None,
            "use_post_quant_conv": self.use_quant_conv,
            "down_block_types": ["DownEncoderBlock2D"] * len(self.channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(self.channels),
        }

    @property
    def names(self) -> names.Names:
        """How checkpoints name the parameters."""
        return names.KL

    @property
    def downsampling(self) -> int:
        """Pixels a latent row or column."""
        return 2 ** (len(self.channels) - 1)


class DownBlock(nnx.Module):
    """One level of the encoder."""

    def __init__(
        self, inputs: int, outputs: int, is_last: bool, config: KLConfig, rngs: nnx.Rngs
    ) -> None:
        widths = [inputs] + [outputs] * config.layers_per_block
        self.resnets = nnx.List(_res_blocks(widths, config, rngs))
        samplers = [] if is_last else [Downsample(outputs, (0, 1), dtype=config.dtype, rngs=rngs)]
        self.downsamplers = nnx.List(samplers)

    def __call__(self, x: Map) -> Map:
        return _chain([*self.resnets, *self.downsamplers], x)


class UpBlock(nnx.Module):
    """One level of the decoder."""

    def __init__(
        self, inputs: int, outputs: int, is_last: bool, config: KLConfig, rngs: nnx.Rngs
    ) -> None:
        widths = [inputs] + [outputs] * (config.layers_per_block + 1)
        self.resnets = nnx.List(_res_blocks(widths, config, rngs))
        samplers = [] if is_last else [Upsample(outputs, dtype=config.dtype, rngs=rngs)]
        self.upsamplers = nnx.List(samplers)

    def __call__(self, x: Map) -> Map:
        return _chain([*self.resnets, *self.upsamplers], x)


class MidBlock(nnx.Module):
    """The lowest level: attention between two residual blocks."""

    def __init__(self, width: int, config: KLConfig, rngs: nnx.Rngs) -> None:
        attention = PixelAttention(width, config.num_groups, EPSILON, dtype=config.dtype, rngs=rngs)
        self.resnets = nnx.List(_res_blocks([width] * 3, config, rngs))
        self.attentions = nnx.List([attention])

    def __call__(self, x: Map) -> Map:
        return _chain([self.resnets[0], self.attentions[0], self.resnets[1]], x)


class Encoder(nnx.Module):
    """Images to the moments of the latents, before `quant_conv`."""

    def __init__(self, config: KLConfig, rngs: nnx.Rngs) -> None:
        channels, dtype = config.channels, config.dtype
        pairs = zip((channels[0], *channels), channels, strict=False)
        last = len(channels) - 1
        self.conv_in = conv3x3(config.in_channels, channels[0], dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List(
            [DownBlock(*pair, i == last, config, rngs) for i, pair in enumerate(pairs)]
        )
        self.mid_block = MidBlock(channels[-1], config, rngs)
        self.conv_norm_out = GroupNorm(channels[-1], config.num_groups, EPSILON, dtype=dtype)
        self.conv_out = conv3x3(channels[-1], 2 * config.latent_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Map) -> Map:
        x = _chain([self.conv_in, *self.down_blocks, self.mid_block], x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Latents, after `post_quant_conv`, to images."""

    def __init__(self, config: KLConfig, rngs: nnx.Rngs) -> None:
        channels, dtype = config.channels[::-1], config.dtype
        pairs = zip((channels[0], *channels), channels, strict=False)
        last = len(channels) - 1
        self.conv_in = conv3x3(config.latent_channels, channels[0], dtype=dtype, rngs=rngs)
        self.mid_block = MidBlock(channels[0], config, rngs)
        self.up_blocks = nnx.List(
            [UpBlock(*pair, i == last, config, rngs) for i, pair in enumerate(pairs)]
        )
        self.conv_norm_out = GroupNorm(channels[-1], config.num_groups, EPSILON, dtype=dtype)
        self.conv_out = conv3x3(channels[-1], config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Map) -> Map:
        x = _chain([self.conv_in, self.mid_block, *self.up_blocks], x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Images [-1, 1] `[B, rows, columns, 3]` to latents `[B, H, W, C]` and back."""

    def __init__(self, config: KLConfig, rngs: nnx.Rngs) -> None:
        moments, latent = 2 * config.latent_channels, config.latent_channels
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)
        if config.use_quant_conv:
            self.quant_conv = linear(moments, moments, dtype=config.dtype, rngs=rngs)
            self.post_quant_conv = linear(latent, latent, dtype=config.dtype, rngs=rngs)
        self.config = config

    def encode(self, images: Images) -> tuple[Latent, Latent]:
        """The posterior's mean and log-variance (clipped to [-30, 20]) in float32, as trained: not scaled.

        Raises ValueError where rows or columns are not multiples of `config.downsampling`.
        """
        _check_multiple(images.shape[1:3], self.config.downsampling)
        moments = self.encoder(jnp.asarray(images))
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30, 20)

    def encode_mode(self, images: Images) -> Latent:
        """The latents that a diffusion model learns: the posterior's mode, scaled."""
        return self.scale(self.encode(images)[0])

    def decode(self, latents: Latent) -> Images:
        """Images in float32 from scaled latents; they may leave [-1, 1] a little."""
        z = self.unscale(latents)
        if self.config.use_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)

    def scale(self, z: Latent) -> Latent:
        """What `encode` gives -> latents of about unit variance."""
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def unscale(self, latents: Latent) -> Latent:
        """The inverse of `scale`."""
        return latents / self.config.scaling_factor + self.config.shift_factor


def _res_blocks(widths: list[int], config: KLConfig, rngs: nnx.Rngs) -> list[ResBlock]:
    return [
        ResBlock(*pair, config.num_groups, EPSILON, dtype=config.dtype, rngs=rngs)
        for pair in itertools.pairwise(widths)
    ]


def _chain(layers: list[nnx.Module], x: Map) -> Map:
    for layer in layers:
        x = layer(x)
    return x


def _check_multiple(sides: tuple[int, ...], factor: int) -> None:
    if any(side % factor for side in sides):
        raise ValueError(
            f"images of {sides[0]} x {sides[1]} pixels; this autoencoder takes multiples of {factor}"
        )
