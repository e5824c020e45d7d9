"""PixArt-alpha, a text-conditioned diffusion transformer (Chen et al. 2023, arXiv:2310.00426), laid out as diffusers'.

Weights start as DiT's (Peebles and Xie 2022, arXiv:2212.09748) and PixArt's do: what a block takes from the text
and what the network returns are zero.
"""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Float

from ldm_jax.models.pixart_config import EPSILON, SINUSOIDS, PixArtConfig
from ldm_jax.models.unet_attention import StackedKeysValues
from ldm_jax.nn.layers import MLP, Attention, KeysValues, Mask, linear, sinusoids, zeros
from ldm_jax.nn.norms import layer_norm
from ldm_jax.nn.stack import Stack
from ldm_jax.types import Arr, Cond, Latent, PerExample

XAVIER = nnx.initializers.xavier_uniform()
# A patch is one input, so its rows and columns count as such.
XAVIER_OF_PATCHES = nnx.initializers.variance_scaling(
    1.0, "fan_avg", "uniform", in_axis=(0, 1, 2), out_axis=3
)
SMALL = nnx.initializers.normal(0.02)

Hidden = Float[Arr, "B N D"]
Modulation = Float[Arr, "B 1 D"]


class PixArtContext(NamedTuple):
    """What a PixArt prepares once per prompt; every array has the batch first.

    `text` holds the keys and the values of the text for each block, [B, layers, L, K, A], `sizes` the embedded
    size of the image, which is added to the embedded time.
    """

    text: StackedKeysValues
    mask: Mask
    sizes: Float[Arr, "B D"] | None


class Block(nnx.Module):
    """Attention to the image itself, to the text, and a feed-forward layer, section 2.3 of the paper.

    The time scales, shifts and gates the first and the last of them (adaLN-single): a block has only a table of
    its own that is added to the modulation that all blocks share.
    """

    def __init__(self, config: PixArtConfig, rngs: nnx.Rngs) -> None:
        width, num_heads = config.width, config.num_heads
        options = {"kernel_init": XAVIER, "dtype": config.dtype, "rngs": rngs}
        self.scale_shift_table = _table(6, width, rngs)
        self.attn1 = Attention(width, width, num_heads, use_bias=True, **options)
        self.attn2 = Attention(width, width, num_heads, use_bias=True, out_init=zeros, **options)
        self.ff = MLP(width, 4 * width, width, nnx.gelu, **options)

    def __call__(
        self, x: Hidden, modulation: Float[Arr, "B six D"], text: KeysValues, mask: Mask
    ) -> Hidden:
        """`modulation` is [B, 6, D] in float32: shift, scale and gate of self-attention, then of the feed-forward."""
        parts = _parts(self.scale_shift_table[...][None] + modulation)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = parts
        h = modulated(x, shift, scale)
        x = (x + gate * self.attn1(h)).astype(x.dtype)
        x += self.attn2(x, text, mask)
        return (x + ff_gate * self.ff(modulated(x, ff_shift, ff_scale))).astype(x.dtype)


class PixArt(nnx.Module):
    """A noisy latent, the time, and a text -> what the network predicts, of the latent's shape.

    Latents are `[B, H, W, in_channels]`, their rows and columns multiples of the patch size. Activations are in
    `config.dtype`; the embedded time, modulations, statistics of norms and the result are float32.
    """

    def __init__(self, config: PixArtConfig, rngs: nnx.Rngs) -> None:
        width, patch, dtype = config.width, config.patch_size, config.dtype
        self.patch_embedding = nnx.Conv(
            config.in_channels,
            width,
            kernel_size=(patch, patch),
            strides=(patch, patch),
            padding="VALID",
            kernel_init=XAVIER_OF_PATCHES,
            dtype=dtype,
            rngs=rngs,
        )
        self.time_embedding = _embedding(width, rngs)
        if config.size_conditioning:
            self.resolution_embedding = _embedding(width // 3, rngs)
            self.aspect_ratio_embedding = _embedding(width // 3, rngs)
        self.modulation = linear(width, 6 * width, kernel_init=SMALL, dtype="float32", rngs=rngs)
        if config.caption_mlp:
            options = {"kernel_init": SMALL, "dtype": dtype, "rngs": rngs}
            self.caption_projection = MLP(config.text_width, width, width, nnx.gelu, **options)
        self.transformer_blocks = Stack(
            lambda rngs: Block(config, rngs), config.depth, rngs, config.remat
        )
        self.scale_shift_table = _table(2, width, rngs)
        outputs = patch * patch * config.out_channels
        self.proj_out = linear(width, outputs, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.config = config

    def prepare(self, cond: Cond) -> PixArtContext:
        """The keys and values of the text for all blocks, and the embedded size; once per prompt when sampling.

        `cond.mask` says which tokens of the text may be attended to. Raises ValueError if the network is told of
        sizes and `cond.sizes` is not [B, 6], and if there is a `cond.concat`, for which it has no input.
        """
        if cond.concat is not None:
            raise ValueError(
                "a PixArt has no input for latents to concatenate; cond.concat must be None"
            )
        config, tokens = self.config, cond.tokens
        if config.caption_mlp:
            tokens = self.caption_projection(tokens)
        k, v = self.transformer_blocks.map(lambda block: block.attn2.keys_values(tokens))
        text = jnp.moveaxis(k, 0, 1), jnp.moveaxis(v, 0, 1)
        sizes = self._embedded_size(cond.sizes) if config.size_conditioning else None
        return PixArtContext(text, cond.mask, sizes)

    def __call__(self, x: Latent, told: PerExample, context: PixArtContext) -> Latent:
        """`told` is the time as the training schedule tells it, 0...999 for the released networks; float32 out.

        Of the channels of the last projection those that the latent has are returned. Raises ValueError for
        latents that cannot be cut into patches.
        """
        time = self.time_embedding(sinusoids(told, SINUSOIDS))
        if context.sizes is not None:
            time += context.sizes
        modulation = rearrange(self.modulation(nnx.silu(time)), "B (six D) -> B six D", six=6)

        def call(block: Block, h: Hidden, text: KeysValues) -> tuple[Hidden, None]:
            return block(h, modulation, text, context.mask), None

        by_layer = tuple(jnp.moveaxis(array, 1, 0) for array in context.text)
        h_BND, _ = self.transformer_blocks.scan(call, self._patches(x), by_layer)
        shift, scale = _parts(self.scale_shift_table[...][None] + time[:, None])
        return self._latent(self.proj_out(modulated(h_BND, shift, scale)), x)

    def _embedded_size(self, sizes: Float[Arr, "B _"] | None) -> Float[Arr, "B D"]:
        """The target's height, width and their ratio, each embedded in a third of the width."""
        if sizes is None or sizes.shape[1] != 6:
            given = None if sizes is None else sizes.shape
            raise ValueError(
                "this PixArt is conditioned on sizes: cond.sizes must be [B, 6], original height and width, crop top"
                f" and left, target height and width in pixels; it is {given}"
            )
        embedded = (
            self.resolution_embedding(sinusoids(sizes[:, 4], SINUSOIDS)),
            self.resolution_embedding(sinusoids(sizes[:, 5], SINUSOIDS)),
            self.aspect_ratio_embedding(sinusoids(sizes[:, 4] / sizes[:, 5], SINUSOIDS)),
        )
        return jnp.concatenate(embedded, axis=-1)

    def _patches(self, x: Latent) -> Hidden:
        """Tokens, row after row, each with its position."""
        config, (H, W) = self.config, x.shape[1:3]
        if H % config.patch_size or W % config.patch_size:
            raise ValueError(
                f"latents of {H} x {W} cannot be cut into patches of {config.patch_size} x {config.patch_size}"
            )
        h_BND = rearrange(self.patch_embedding(x), "B H W D -> B (H W) D")
        rows, columns = H // config.patch_size, W // config.patch_size
        position_ND = positions(rows, columns, config.base, config.width)
        return (h_BND + position_ND[None]).astype(config.dtype)

    def _latent(self, patches: Float[Arr, "B N _"], x: Latent) -> Latent:
        """The patches put together to the shape of `x`, without the channels that it does not have."""
        patch, (_, H, _, C) = self.config.patch_size, x.shape
        pattern = "B (H W) (p q C) -> B (H p) (W q) C"
        y = rearrange(patches, pattern, H=H // patch, p=patch, q=patch)
        return y[..., :C].astype(jnp.float32)


def modulated(x: Hidden, shift: Modulation, scale: Modulation) -> Hidden:
    """Layer norm of `x`, scaled by 1 + `scale` and shifted; computed in float32, returned in the dtype of `x`."""
    return layer_norm(x, 1 + scale, shift, EPSILON).astype(x.dtype)


def positions(rows: int, columns: int, base: float, width: int) -> Float[Arr, "N {width}"]:
    """Sines and cosines of the column, then of the row, of each of `rows` x `columns` patches.

    Rows and columns alike lie evenly from 0 to below `base`, however many they are: a larger grid is a finer one.
    """

    def along(number: int) -> Float[Arr, "number half"]:
        waves = sinusoids(jnp.arange(number) * (base / number), width // 2)
        return jnp.roll(waves, width // 4, axis=-1)  # sines first

    column_HWD = repeat(along(columns), "W D -> H W D", H=rows)
    row_HWD = repeat(along(rows), "H D -> H W D", W=columns)
    return rearrange(jnp.concatenate([column_HWD, row_HWD], axis=-1), "H W D -> (H W) D")


def _embedding(outputs: int, rngs: nnx.Rngs) -> MLP:
    return MLP(SINUSOIDS, outputs, outputs, kernel_init=SMALL, dtype="float32", rngs=rngs)


def _table(parts: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (parts, width)))


def _parts(modulation: Float[Arr, "B parts D"]) -> Float[Arr, "parts B 1 D"]:
    return rearrange(modulation, "B parts D -> parts B 1 D")
