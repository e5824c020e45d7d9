"""The layers that networks share; attributes are named as diffusers names them."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import nnx
from jaxtyping import Bool, Float

from ldm_jax.nn.attention import attention
from ldm_jax.nn.norms import GroupNorm
from ldm_jax.nn.placement import Axes, dividing, gathered, in_parts
from ldm_jax.nn.platform import platform
from ldm_jax.types import TENSOR_AXIS, Arr, PerExample

Map = Float[Arr, "B _ _ _"]  # rows, columns, channels
KeysValues = tuple[Float[Arr, "B L _ _"], Float[Arr, "B L _ _"]]
Mask = Bool[Arr, "B L"] | None
UNFOLDED = 256  # pixels of a batch of maps that CPUs take as one product of matrices
WHOLE = (None, None)  # axes of a mesh that divide a kernel while it is used
zeros = nnx.initializers.zeros
LECUN = nnx.initializers.lecun_normal()


def linear(
    inputs: int, outputs: int, *, over: tuple[Axes, Axes] = WHOLE, **options: Any
) -> nnx.Linear:
    """A dense layer over the last dim, as one product of two matrices: on CPUs its gradient takes half the time.

    `over` names the axes of a mesh that divide the inputs and the outputs of the kernel while it is used.
    """
    product = functools.partial(_matrix_product, over=over)
    return nnx.Linear(inputs, outputs, dot_general=product, **options)


def into_heads(
    layer: nnx.Linear, x: Float[Arr, "B L D"], num_heads: int
) -> Float[Arr, "B L {num_heads} A"]:
    """`layer(x)` divided into heads. The product gives them as attention takes them, which saves TPUs a transpose."""
    x, kernel, bias = _cast(layer, x)
    kernel = gathered(kernel, None, dividing(num_heads))
    y_BLKA = jnp.einsum("BLD,DKA->BLKA", x, rearrange(kernel, "D (K A) -> D K A", K=num_heads))
    if bias is None:
        return y_BLKA
    return y_BLKA + rearrange(bias, "(K A) -> 1 1 K A", K=num_heads)


def from_heads(layer: nnx.Linear, x: Float[Arr, "B L K A"]) -> Float[Arr, "B L D"]:
    """`layer` of heads side by side, as `into_heads` without a transpose; CPUs would rather have it."""
    if platform() == "cpu" and not in_parts():
        return layer(rearrange(x, "B L K A -> B L (K A)"))
    x, kernel, bias = _cast(layer, x)
    kernel = gathered(kernel, dividing(x.shape[2]), None)
    y = jnp.einsum("BLKA,KAD->BLD", x, rearrange(kernel, "(K A) D -> K A D", K=x.shape[2]))
    return y if bias is None else y + bias[None, None]


def _cast(layer: nnx.Linear, x: Arr) -> list[jax.Array | None]:
    """Input, kernel and bias in the layer's dtype."""
    bias = None if layer.bias is None else layer.bias[...]
    arrays = (x, layer.kernel[...], bias)
    return [None if array is None else jnp.asarray(array, layer.dtype) for array in arrays]


def dense(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype: Any, over: tuple[Axes, Axes] = WHOLE
) -> jax.Array:
    """What `linear` computes with these parameters, in `dtype`."""
    x, kernel, bias = (array.astype(dtype) for array in (x, kernel, bias))
    return _matrix_product(x, kernel, None, over=over) + jnp.expand_dims(bias, range(x.ndim - 1))


def _matrix_product(
    x: jax.Array, kernel: jax.Array, _: Any, *, over: tuple[Axes, Axes], **options: Any
) -> jax.Array:
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), gathered(kernel, *over), **options)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def gelu(x: Arr) -> Arr:
    """x Phi(x) (Hendrycks & Gimpel 2016, arXiv:1606.08415), with the normal distribution's function Phi.

    In half precision by its tanh form, equation 2 there, which TPUs compute in two thirds of the time: it is wrong
    by 5e-4 at most, as much as bfloat16 rounds a value of 1/4 by.
    """
    half = x.dtype in (jnp.bfloat16, jnp.float16)
    return jax.nn.gelu(x.astype(jnp.float32), approximate=half).astype(x.dtype)


def conv3x3(
    inputs: int,
    outputs: int,
    *,
    dtype: str,
    rngs: nnx.Rngs,
    strides: int = 1,
    padding: tuple[int, int] = (1, 1),
    kernel_init: nnx.Initializer = LECUN,
) -> "Conv":
    """A 3x3 convolution whose `padding` (before, after) is that of rows and of columns."""
    return Conv(
        inputs,
        outputs,
        kernel_size=(3, 3),
        strides=(strides, strides),
        padding=(padding, padding),
        kernel_init=kernel_init,
        conv_general_dilated=_convolution,
        dtype=dtype,
        rngs=rngs,
    )


def _convolution(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(x, gathered(kernel), *args, **options)


class Conv(nnx.Conv):
    """Flax's; small maps on CPUs are unfolded for one product of matrices, which takes half the time there."""

    def __call__(self, x: Map) -> Map:
        small = math.prod(x.shape[:3]) <= UNFOLDED and self.strides == (1, 1)
        if platform() != "cpu" or not small:
            return super().__call__(x)
        rows, columns = (size - 1 for size in self.kernel_size)
        (H, W), x = x.shape[1:3], jnp.pad(x, ((0, 0), *self.padding, (0, 0)))
        taps = [x[:, i:, j:] for i in range(rows + 1) for j in range(columns + 1)]
        unfolded = jnp.concatenate([tap[:, :H, :W] for tap in taps], axis=-1)
        kernel = rearrange(self.kernel[...], "rows columns C D -> (rows columns C) D")
        return dense(unfolded, kernel, self.bias[...], self.dtype)


def doubled(x: Map) -> Map:
    """Every pixel four times."""
    return repeat(x, "B H W C -> B (H h) (W w) C", h=2, w=2)


def halved(x: Map) -> Map:
    """The mean of every four pixels."""
    return reduce(x, "B (H h) (W w) C -> B H W C", "mean", h=2, w=2)


RESAMPLE: dict[str, Callable[[Map], Map]] = {"none": lambda x: x, "down": halved, "up": doubled}


class Downsample(nnx.Module):
    """Halves rows and columns by a strided convolution.

    `padding` is (1, 1) in the UNet; (0, 1) in the autoencoder, which pads below and to the right only.
    """

    def __init__(
        self, channels: int, padding: tuple[int, int], *, dtype: str, rngs: nnx.Rngs
    ) -> None:
        self.conv = conv3x3(channels, channels, strides=2, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, x: Map) -> Map:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles rows and columns: every pixel four times, then a convolution."""

    def __init__(self, channels: int, *, dtype: str, rngs: nnx.Rngs) -> None:
        self.conv = conv3x3(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Map) -> Map:
        return self.conv(doubled(x))


class ResBlock(nnx.Module):
    """Two convolutions around the embedding of the time, if there is one, and a skip connection.

    With a time (`time_width`) the second convolution starts at zero, so that the block starts as its skip connection
    (Ho et al. 2020 and LDM's UNet); LDM's autoencoder, which has no time, starts all convolutions alike. With
    `scale_shift` the time scales and shifts the second norm (Dhariwal & Nichol 2021, arXiv:2105.05233, section 3)
    instead of being added before it. `resample`, a row of RESAMPLE, halves or doubles rows and columns on the way.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        num_groups: int,
        epsilon: float,
        *,
        time_width: int = 0,
        scale_shift: bool = False,
        resample: str = "none",
        dtype: str,
        rngs: nnx.Rngs,
    ) -> None:
        last_init = zeros if time_width else LECUN
        self.norm1 = GroupNorm(inputs, num_groups, epsilon, dtype=dtype)
        self.conv1 = conv3x3(inputs, outputs, dtype=dtype, rngs=rngs)
        if time_width:
            told = 2 * outputs if scale_shift else outputs
            self.time_emb_proj = linear(time_width, told, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(outputs, num_groups, epsilon, dtype=dtype)
        self.conv2 = conv3x3(outputs, outputs, kernel_init=last_init, dtype=dtype, rngs=rngs)
        if inputs != outputs:
            self.conv_shortcut = linear(inputs, outputs, dtype=dtype, rngs=rngs)
        self.has_shortcut, self.scale_shift = inputs != outputs, scale_shift
        self.resample = resample

    def __call__(self, x: Map, time: Float[Arr, "B T"] | None = None) -> Map:
        """`time` is the embedded time after its SiLU."""
        resample = RESAMPLE[self.resample]
        h = self.conv1(resample(nnx.silu(self.norm1(x))))
        told = None if time is None else self.time_emb_proj(time)[:, None, None]
        h = self.conv2(nnx.silu(self._second_norm(h, told)))
        x = resample(x)
        return h + (self.conv_shortcut(x) if self.has_shortcut else x)

    def _second_norm(self, h: Map, told: Map | None) -> Map:
        if told is None:
            return self.norm2(h)
        if not self.scale_shift:
            return self.norm2(h + told)
        scale, shift = jnp.split(told, 2, axis=-1)
        return self.norm2(h) * (1 + scale) + shift


class PixelAttention(nnx.Module):
    """Self-attention of one head between all the pixels of a map, as the autoencoder has it in its middle."""

    def __init__(
        self, channels: int, num_groups: int, epsilon: float, *, dtype: str, rngs: nnx.Rngs
    ) -> None:
        self.group_norm = GroupNorm(channels, num_groups, epsilon, dtype=dtype)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            linear(channels, channels, dtype=dtype, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: Map) -> Map:
        h_BND = rearrange(self.group_norm(x), "B H W D -> B (H W) D")
        q, k, v = (project(h_BND)[:, :, None] for project in (self.to_q, self.to_k, self.to_v))
        return x + self.to_out(attention(q, k, v)[:, :, 0]).reshape(x.shape)


class Attention(nnx.Module):
    """Multi-head attention of tokens of `width` to tokens of `source_width`, in two steps, of which the first is kept.

    `use_bias` is of the queries, keys and values; the last projection has a bias anyway. `out_init` initialises its
    kernel where that is not `kernel_init`.
    """

    def __init__(
        self,
        width: int,
        source_width: int,
        num_heads: int,
        *,
        use_bias: bool = False,
        kernel_init: nnx.Initializer = LECUN,
        out_init: nnx.Initializer | None = None,
        dtype: str,
        rngs: nnx.Rngs,
    ) -> None:
        options = {"use_bias": use_bias, "kernel_init": kernel_init, "dtype": dtype, "rngs": rngs}
        self.to_q = linear(width, width, **options)
        self.to_k = linear(source_width, width, **options)
        self.to_v = linear(source_width, width, **options)
        out_init = out_init or kernel_init
        self.to_out = linear(width, width, kernel_init=out_init, dtype=dtype, rngs=rngs)
        self.num_heads = num_heads

    def keys_values(self, source: Float[Arr, "B L E"]) -> KeysValues:
        return tuple(into_heads(layer, source, self.num_heads) for layer in (self.to_k, self.to_v))

    def __call__(
        self, x: Float[Arr, "B N D"], keys_values: KeysValues | None = None, mask: Mask = None
    ) -> Float[Arr, "B N D"]:
        """Attends to what `keys_values` made of the source, or without it to `x` itself."""
        k, v = self.keys_values(x) if keys_values is None else keys_values
        q = into_heads(self.to_q, x, self.num_heads)
        return from_heads(self.to_out, attention(q, k, v, mask=mask))


class MLP(nnx.Module):
    """Two linear layers with an activation between them; diffusers' TimestepEmbedding, PixArtAlphaTextProjection."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        activation: Callable[[jax.Array], jax.Array] = nnx.silu,
        *,
        kernel_init: nnx.Initializer = LECUN,
        dtype: str,
        rngs: nnx.Rngs,
    ) -> None:
        options = {"kernel_init": kernel_init, "dtype": dtype, "rngs": rngs}
        self.linear_1 = linear(inputs, hidden, over=(None, TENSOR_AXIS), **options)
        self.linear_2 = linear(hidden, outputs, over=(TENSOR_AXIS, None), **options)
        self.activation = activation

    def __call__(self, x: Float[Arr, "*B _"]) -> Float[Arr, "*B _"]:
        return self.linear_2(self.activation(self.linear_1(x)))


def sinusoids(told: PerExample, width: int) -> Float[Arr, "B {width}"]:
    """Cosines, then sines, of `told` at width/2 frequencies from 1 down to almost 1/10000 (Vaswani et al. 2017)."""
    half = width // 2
    frequencies = jnp.exp(jnp.arange(half) * (-math.log(10_000) / half))
    angles = told.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
