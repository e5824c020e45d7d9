"""The types that every layer shares, and the legend of dimensions.

Dimensions, written as suffixes in model bodies (`q_BNKA`) and as names in signatures:

    B batch            N image tokens        K heads
    H latent rows      L text tokens         A head width
    W latent columns   E text width          F feed-forward width
    C latent channels  D model width         S sampler steps

Images are `[B, rows, columns, 3]` in [-1, 1], pixels the same in 256 values, 0 to 255. Latents are `[B, H, W, C]`,
scaled to about unit variance.
Training time `t` runs from 0 (data) to 1 (noise).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key, UInt8, UInt32

BATCH_AXES = ("data", "fsdp")  # axes of a mesh that divide a batch
PARAMETER_AXIS = "fsdp"  # that which divides parameters
TENSOR_AXIS = "tensor"  # that which divides heads and the width of feed-forward layers

Arr = Array | np.ndarray
Params = Any  # nested dict of arrays
Context = Any  # what a network has prepared from the prompt alone
Latent = Float[Arr, "B H W C"]
Images = Float[Arr, "B rows columns 3"]
SomeImages = Float[Arr, "_ rows columns 3"]  # a part, of any number
Pixels = UInt8[Arr, "B rows columns C"]  # as files hold them
Tokens = Int32[Arr, "B L"]
NegativeTokens = Int32[Arr, "negatives L"]  # one caption for all of a batch, or one each
PerExample = Float[Arr, " B"]
Keys = Key[jax.Array, " B"]


class Cond(NamedTuple):
    """An encoded prompt, and whatever else conditions the network."""

    tokens: Float[Arr, "B L E"]
    mask: Bool[Arr, "B L"] | None = None
    pooled: Float[Arr, "B E2"] | None = None
    sizes: Float[Arr, "B six"] | None = None
    concat: Latent | None = None


class Batch(NamedTuple):
    """One training batch.

    `cond` is tokens, a Cond, or any other pytree [B, ...] that the objective takes; `weight` 0 marks padding;
    `index` is each example's position in the global order.
    """

    latents: Latent
    cond: Any
    weight: PerExample
    index: UInt32[Arr, " B"]


class Point(NamedTuple):
    """A place on the noise path, x = alpha x_0 + sigma eps, and what the network is told of the time."""

    alpha: Float[Arr, "*points"]
    sigma: Float[Arr, "*points"]
    told: Float[Arr, "*points"]


class Denoised(NamedTuple):
    """A network's prediction in both forms."""

    x_0: Latent
    eps: Latent


class Estimate(NamedTuple):
    """A score with its 95% interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    count: int


Apply = Callable[[Params, Latent, Float[Arr, " B"], Context], Latent]
Denoise = Callable[[Latent, Point], Denoised]
