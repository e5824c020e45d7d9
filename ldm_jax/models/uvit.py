"""U-ViT (Bao et al. 2022, arXiv:2209.12152): time, text and image as one sequence of tokens, with long skips.

M counts the tokens of the sequence: one of the time, L of the text, N of the image.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Bool, Float

from ldm_jax.models.uvit_config import EPSILON, UViTConfig
from ldm_jax.nn.layers import Attention, conv3x3, gelu, linear, sinusoids
from ldm_jax.nn.norms import LayerNorm
from ldm_jax.nn.stack import Stack, rematerialised
from ldm_jax.types import Arr, Cond, Latent, PerExample

# Of positions and linear layers, as in the authors' code; patches, a convolution there, start as convolutions do.
INIT = nnx.initializers.normal(0.02)

Sequence = Float[Arr, "B M D"]
Mask = Bool[Arr, "B M"] | None


class UViTContext(NamedTuple):
    """What a U-ViT prepares once per prompt; every array has the batch first."""

    text: Float[Arr, "B L D"]
    mask: Bool[Arr, "B L"] | None
    concat: Latent | None


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: UViTConfig, rngs: nnx.Rngs) -> None:
        inner = config.mlp_ratio * config.width
        self.norm1, self.norm2 = (_layer_norm(config, rngs) for _ in range(2))
        options = {"kernel_init": INIT, "dtype": config.dtype, "rngs": rngs}
        self.attn = Attention(config.width, config.width, config.num_heads, **options)
        self.expand = _linear(config.width, inner, config, rngs)
        self.contract = _linear(inner, config.width, config, rngs)

    def __call__(self, x_BMD: Sequence, mask: Mask) -> Sequence:
        x_BMD += self.attn(self.norm1(x_BMD), mask=mask)
        h_BMF = gelu(self.expand(self.norm2(x_BMD)))
        return x_BMD + self.contract(h_BMF)


class SkipBlock(Block):
    """A block of the second half: first a linear layer joins its input and what the first half kept for it.

    Of the ways to join them that the paper compares (section 3.1), the one that it chooses.
    """

    def __init__(self, config: UViTConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        self.join = _linear(2 * config.width, config.width, config, rngs)

    def __call__(self, x_BMD: Sequence, mask: Mask, kept_BMD: Sequence) -> Sequence:
        return super().__call__(self.join(jnp.concatenate([x_BMD, kept_BMD], axis=-1)), mask)


class UViT(nnx.Module):
    """A noisy latent, the time, and a text -> what the network predicts, with the latent's rows and columns.

    Latents are `[B, H, W, in_channels]`, or fewer channels where `cond.concat` brings the rest; H and W are multiples
    of `patch_size`. Where they are not `sample_size`, the image's positions are resampled bilinearly (and antialiased
    where they become fewer).
    """

    def __init__(self, config: UViTConfig, rngs: nnx.Rngs) -> None:
        width, out, half = config.width, config.out_channels, config.depth // 2
        area, side = config.patch_size**2, config.sample_size // config.patch_size
        self.patch_embed = linear(area * config.in_channels, width, dtype=config.dtype, rngs=rngs)
        self.text_embed = _linear(config.text_width, width, config, rngs)
        self.time_position = nnx.Param(INIT(rngs.params(), (width,)))
        self.text_position = nnx.Param(INIT(rngs.params(), (config.text_length, width)))
        self.image_position = nnx.Param(INIT(rngs.params(), (side, side, width)))
        self.in_blocks = Stack(lambda rngs: Block(config, rngs), half, rngs, config.remat)
        self.mid_block = Block(config, rngs)
        self.out_blocks = Stack(lambda rngs: SkipBlock(config, rngs), half, rngs, config.remat)
        self.norm = _layer_norm(config, rngs)
        self.to_patches = _linear(width, area * out, config, rngs)
        self.conv_out = conv3x3(out, out, dtype=config.dtype, rngs=rngs)
        self.config = config

    def prepare(self, cond: Cond) -> UViTContext:
        """The tokens of the text, once per prompt when sampling. Raises ValueError for more than `text_length`."""
        length, longest = cond.tokens.shape[1], self.config.text_length
        if length > longest:
            raise ValueError(f"{length} tokens a caption; this U-ViT has {longest} positions")
        text_BLD = self.text_embed(cond.tokens)
        position_LD = self.text_position[:length].astype(text_BLD.dtype)
        return UViTContext(text_BLD + position_LD[None], cond.mask, cond.concat)

    def __call__(self, x: Latent, told: PerExample, context: UViTContext) -> Latent:
        """`told` is the time as the training schedule tells it, 0...999 for Stable Diffusion; float32 out.

        Raises ValueError for latents that cannot be cut into patches.
        """
        if context.concat is not None:
            x = jnp.concatenate([x, context.concat], axis=-1)
        image_BHWD = self._image(x)
        rows, columns = image_BHWD.shape[1:3]
        image_BND = rearrange(image_BHWD, "B H W D -> B (H W) D")
        x_BMD = jnp.concatenate([self._time(told), context.text, image_BND], axis=1)
        x_BMD = self.blocks(x_BMD, _visible(context.mask, rows * columns))
        y_BND = self.to_patches(self.norm(x_BMD[:, -rows * columns :]))
        patch = {"p": self.config.patch_size, "q": self.config.patch_size}
        y = rearrange(y_BND, "B (H W) (p q C) -> B (H p) (W q) C", H=rows, **patch)
        return self.conv_out(y).astype(jnp.float32)

    def _time(self, told: PerExample) -> Float[Arr, "B 1 D"]:
        """Sinusoids alone are the token, without layers of their own, as in all the authors' configs."""
        time_BD = sinusoids(told, self.config.width) + self.time_position[...][None]
        return time_BD.astype(self.config.dtype)[:, None]

    def _image(self, x: Latent) -> Float[Arr, "B _ _ D"]:
        """A token for every patch, with its position."""
        rows, columns, patch = *x.shape[1:3], self.config.patch_size
        if rows % patch or columns % patch:
            raise ValueError(
                f"latents of {rows} x {columns} cannot be cut into patches of {patch} x {patch}"
            )
        image = self.patch_embed(rearrange(x, "B (H p) (W q) C -> B H W (p q C)", p=patch, q=patch))
        position = jax.image.resize(self.image_position[...], image.shape[1:], "linear")
        return image + position.astype(image.dtype)[None]

    def blocks(self, x_BMD: Sequence, mask: Mask) -> Sequence:
        """The first half keeps its outputs; the second half takes them back, last first."""

        def enter(block: Block, x_BMD: Sequence, _: None) -> tuple[Sequence, Sequence]:
            x_BMD = block(x_BMD, mask)
            return x_BMD, x_BMD

        def leave(block: SkipBlock, x_BMD: Sequence, kept_BMD: Sequence) -> tuple[Sequence, None]:
            return block(x_BMD, mask, kept_BMD), None

        x_BMD, kept = self.in_blocks.scan(enter, x_BMD)
        x_BMD = rematerialised(self.mid_block.__call__, self.config.remat)(x_BMD, mask)
        return self.out_blocks.scan(leave, x_BMD, jnp.flip(kept, axis=0))[0]


def _visible(mask: Bool[Arr, "B L"] | None, num_image_tokens: int) -> Mask:
    """The mask of the text, extended to the sequence: time and image are always seen."""
    if mask is None:
        return None
    return jnp.pad(mask, ((0, 0), (1, num_image_tokens)), constant_values=True)


def _linear(inputs: int, outputs: int, config: UViTConfig, rngs: nnx.Rngs) -> nnx.Linear:
    return linear(inputs, outputs, kernel_init=INIT, dtype=config.dtype, rngs=rngs)


def _layer_norm(config: UViTConfig, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(config.width, epsilon=EPSILON, dtype=config.dtype, rngs=rngs)
