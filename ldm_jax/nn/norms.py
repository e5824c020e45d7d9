"""Norms: the one place where activations are standardised, with statistics in float32."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float

from ldm_jax.types import Arr

PARTS = 8  # the first of so many parts of the values gives the estimate of their mean
# The backward pass computes float32 copies of activations again; kept, they would double what a scan of blocks stores.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


@functools.partial(recomputed, static_argnums=1)
def moments(
    x: Float[Arr, "..."], dims: tuple[int, ...]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns mean and variance over `dims`, kept as dims of size 1, in float32.

    E[x^2] - E[x]^2 loses the variance where the mean is many deviations. So an estimate of the mean is subtracted
    first, which changes no variance; then both sums take one pass over `x`. The estimate is the mean of the first of
    PARTS: whatever the values are, its squared distance from the mean of all n is below 2 PARTS variances, where that
    of a single value is up to n - 1 of them, if it is an outlier.
    """
    x = x.astype(jnp.float32)
    first = jax.lax.slice_in_dim(x, 0, max(1, x.shape[dims[0]] // PARTS), axis=dims[0])
    estimate = jax.lax.stop_gradient(jnp.mean(first, dims, keepdims=True))
    shifted = x - estimate
    mean = jnp.mean(shifted, dims, keepdims=True)
    square = jnp.mean(jnp.square(shifted), dims, keepdims=True)
    return estimate + mean, jnp.maximum(square - jnp.square(mean), 0)


@recomputed
def scaled(
    x: Float[Arr, "..."],
    mean: Float[Array, "..."],
    inverse: Float[Array, "..."],
    scale: Float[Arr, "..."],
    bias: Float[Arr, "..."],
) -> Float[Array, "..."]:
    """Returns (x - mean) inverse scale + bias in float32."""
    return (x.astype(jnp.float32) - mean) * (inverse * scale) + bias


def layer_norm(
    x: Float[Arr, "..."], scale: Float[Arr, "..."], bias: Float[Arr, "..."], epsilon: float
) -> Float[Array, "..."]:
    """Returns `x` with mean 0 and variance 1 over its last dim, times `scale` plus `bias`, in float32."""
    mean, variance = moments(x, (x.ndim - 1,))
    return scaled(x, mean, jax.lax.rsqrt(variance + epsilon), scale, bias)


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation over the last dim (Ba et al. 2016, arXiv:1607.06450), with `scale` and `bias`."""

    def __call__(self, x: Float[Arr, "..."]) -> Float[Array, "..."]:
        scale, bias = (
            jnp.expand_dims(param[...], range(x.ndim - 1)) for param in (self.scale, self.bias)
        )
        return layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


class GroupNorm(nnx.Module):
    """Group normalisation (Wu and He 2018, arXiv:1803.08494) of maps.

    The moments of channels make those of their group, so activations are not reshaped into groups.
    """

    def __init__(self, channels: int, num_groups: int, epsilon: float, *, dtype: str) -> None:
        if channels % num_groups:
            raise ValueError(f"{channels} channels do not divide into {num_groups} groups")
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))
        self.num_groups, self.epsilon, self.dtype = num_groups, epsilon, dtype

    def __call__(self, x: Float[Arr, "B H W C"]) -> Float[Array, "B H W C"]:
        mean_BGc, variance_BGc = (
            rearrange(moment, "B 1 1 (G c) -> B G c", G=self.num_groups)
            for moment in moments(x, (1, 2))
        )
        mean_BG1 = jnp.mean(mean_BGc, axis=-1, keepdims=True)
        variance_BG1 = jnp.mean(
            variance_BGc + jnp.square(mean_BGc - mean_BG1), axis=-1, keepdims=True
        )
        mean, inverse = (
            repeat(moment, "B G 1 -> B 1 1 (G c)", c=mean_BGc.shape[-1])
            for moment in (mean_BG1, jax.lax.rsqrt(variance_BG1 + self.epsilon))
        )
        scale, bias = (param[...][None, None, None] for param in (self.scale, self.bias))
        return scaled(x, mean, inverse, scale, bias).astype(self.dtype)
