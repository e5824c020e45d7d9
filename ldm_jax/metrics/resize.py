"""Resizing as each score wants it, on the device: any size to any size, and pure functions that may be jitted.

A Fréchet distance moves by whole points with the resizing before its network (Parmar et al. 2022, arXiv:2104.11222),
so each score keeps that of the program that made it known. Images in [-1, 1] become pixels, 0...255, and images again:

    FID as TensorFlow 1 and torch-fidelity compute it    as_torch_fidelity
    FID as clean-fid computes it                         as_clean_fid
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from ldm_jax.types import Arr, Images, Pixels

FloatPixels = Float[Arr, "B rows columns C"]

SIZE = (299, 299)  # of what Inception-v3 was trained on
# TPUs would multiply in bfloat16, which has 8 bits, as pixels have.
PRECISION = jax.lax.Precision.HIGHEST
BITS = 22  # of a weight behind the point, in Pillow's arithmetic of uint8


def triangle(x: np.ndarray) -> np.ndarray:
    """Linear interpolation's kernel."""
    return np.maximum(1 - np.abs(x), 0)


def cubic(x: np.ndarray) -> np.ndarray:
    """The kernel of Keys 1981 ("Cubic convolution interpolation"), equation 15: a = -1/2."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


METHODS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"bilinear": triangle, "bicubic": cubic}


def rounded(images: Images) -> FloatPixels:
    """Images in [-1, 1] -> the nearest of 256 values, as they are saved, in float32: NaN stays NaN, and is seen later.

    What lies outside is clipped; half way between two values, the even one is taken.
    """
    return jnp.round((jnp.clip(jnp.asarray(images, jnp.float32), -1, 1) + 1) * 127.5)


def to_pixels(images: Images) -> Pixels:
    """The same as uint8, a quarter of the bytes; NaN becomes some value."""
    return rounded(images).astype(jnp.uint8)


def to_images(pixels: Pixels | FloatPixels) -> Images:
    """The inverse of `rounded`, in float32."""
    return jnp.asarray(pixels, jnp.float32) / 127.5 - 1


def as_torch_fidelity(
    images: Images, size: tuple[int, int] = SIZE
) -> Float[Arr, "B {size[0]} {size[1]} 3"]:
    """Images in [-1, 1] as the first graph of FID resizes them, and torch-fidelity after it: from 256 values."""
    return to_images(resize_like_tensorflow1(rounded(images), size))


def as_clean_fid(
    images: Images, size: tuple[int, int] = SIZE
) -> Float[Arr, "B {size[0]} {size[1]} 3"]:
    """Images in [-1, 1] as clean-fid's mode "clean" resizes them: from 256 values, and not rounded to them again."""
    pixels = resize_like_pillow(rounded(images), size, "bicubic")
    return to_images(jnp.clip(pixels, 0, 255))


def resize_like_tensorflow1(
    images: Pixels | FloatPixels, size: tuple[int, int]
) -> Float[Arr, "B {size[0]} {size[1]} C"]:
    """TensorFlow 1's `resize_bilinear` with `align_corners=False`: to `size`, (rows, columns), in float32.

    It samples at the output's index times the scale, without half a pixel more, and does not antialias.
    """
    images = jnp.asarray(images, jnp.float32)
    return _lerp(_lerp(images, size[1], axis=2), size[0], axis=1)  # columns first, as there


def _lerp(images: Arr, length: int, axis: int) -> jax.Array:
    # In float32 as there: where a place falls on a pixel, rounding decides which two it lies between.
    places = np.arange(length, dtype=np.float32) * np.float32(images.shape[axis] / length)
    before = places.astype(np.int32)
    low = jnp.take(images, before, axis)
    high = jnp.take(images, np.minimum(before + 1, images.shape[axis] - 1), axis)
    fractions = np.expand_dims(places - before, [dim for dim in range(4) if dim != axis])
    return low + (high - low) * fractions


def resize_like_pillow(
    images: Pixels | FloatPixels, size: tuple[int, int], method: str
) -> UInt8[Arr, "B {size[0]} {size[1]} C"] | Float[Arr, "B {size[0]} {size[1]} C"]:
    """Pillow's `Image.resize`, antialiased, to `size`, (rows, columns), by a row of METHODS.

    uint8 is rounded and clipped after each pass, bit for bit as Pillow does it; floats, channels of Pillow's mode
    "F", are neither. Columns come first, as always before Pillow 13; that takes rows first where it is less work, never
    for squares, and then rounds some values of uint8 otherwise.

    Raises ValueError for another method.
    """
    if method not in METHODS:
        raise ValueError(f"images can be resized by {' or '.join(METHODS)}, not by {method!r}")
    images = jnp.asarray(images)
    resized = _fixed_point if images.dtype == jnp.uint8 else _floating_point
    for axis in (2, 1):
        images = resized(
            images, _weights(images.shape[axis], size[axis - 1], METHODS[method]), axis
        )
    return images


def _floating_point(images: jax.Array, weights: np.ndarray, axis: int) -> jax.Array:
    return _weighted(images, weights.astype(images.dtype), axis)


def _fixed_point(images: jax.Array, weights: np.ndarray, axis: int) -> jax.Array:
    scaled = weights * 2**BITS
    whole = np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int32)
    sums = _weighted(images.astype(jnp.int32), whole, axis)  # stays below 2^31
    return jnp.clip((sums + 2 ** (BITS - 1)) >> BITS, 0, 255).astype(jnp.uint8)


def _weighted(images: jax.Array, weights: np.ndarray, axis: int) -> jax.Array:
    product = "BHWC,wW->BHwC" if axis == 2 else "BHWC,hH->BhWC"
    return jnp.einsum(product, images, weights, precision=PRECISION)


def _weights(inputs: int, outputs: int, kernel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """How much each pixel of a row adds to each one of the resized row: `[outputs, inputs]`.

    jax.image.resize has the same weights, in float32: too coarse to round every pixel as Pillow does.
    """
    scale = inputs / outputs
    centres = (np.arange(outputs) + 0.5) * scale
    distances = np.arange(inputs)[None] + 0.5 - centres[:, None]
    weights = kernel(distances / max(scale, 1.0))
    return weights / weights.sum(axis=1, keepdims=True)
