"""Scores of images against the images that they should be: PSNR and SSIM, one number a pair; LPIPS is a network."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from scipy.signal import windows

from ldm_jax.types import Arr, Images

References = Float[Arr, "B _ _ 3"]  # like the images, which `paired` sees to

RANGE = 2.0  # of images in [-1, 1]
# Of 8 bits, as libvmaf bounds PSNR (6 * bits + 12): equal images, whose PSNR is infinite, count as so near.
MOST_DECIBELS = 60.0
WINDOW = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03


def psnr(images: Images, references: References) -> Float[Array, " B"]:
    """Peak signal-to-noise ratio, 10 log10(range^2 / mean squared error), in dB, of images in [-1, 1].

    It is infinite for equal images. Raises ValueError for images of different shapes.
    """
    images, references = paired(images, references)
    error_B = jnp.mean(jnp.square(images - references), axis=(1, 2, 3))
    return 10 * jnp.log10(RANGE**2 / error_B)


def ssim(images: Images, references: References) -> Float[Array, " B"]:
    """Structural similarity (Wang et al. 2004, doi:10.1109/TIP.2003.819861, equation 13) of images in [-1, 1].

    Their Gaussian window of 11 x 11 pixels and deviation 1.5 lies within the image; the similarity of each channel is
    averaged over windows, then over channels. Raises ValueError for images of different shapes, and for images
    smaller than the window.
    """
    images, references = paired(images, references)
    if min(images.shape[1:3]) < WINDOW:
        raise ValueError(
            f"images are {images.shape[1:3]} pixels; SSIM's window takes {WINDOW} or more"
        )
    mean_x, mean_y = _window(images), _window(references)
    variance_x = _window(jnp.square(images)) - jnp.square(mean_x)
    variance_y = _window(jnp.square(references)) - jnp.square(mean_y)
    covariance = _window(images * references) - mean_x * mean_y
    c_1, c_2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c_1) / (jnp.square(mean_x) + jnp.square(mean_y) + c_1)
    structure = (2 * covariance + c_2) / (variance_x + variance_y + c_2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def paired(images: Images, references: References) -> tuple[Images, Images]:
    """Both in float32. Raises ValueError for images of different shapes."""
    if images.shape != references.shape:
        raise ValueError(
            f"images are {images.shape} and their references {references.shape}; the shapes have to be the same"
        )
    return jnp.asarray(images, jnp.float32), jnp.asarray(references, jnp.float32)


def _window(x: Images) -> Float[Array, "B _ _ 3"]:
    """Weighted means of every window that lies within the image.

    As sums of shifted copies: TPUs would round the factors of a convolution to bfloat16, and what is left of a
    variance after its subtraction would be noise.
    """
    weights = windows.gaussian(WINDOW, SIGMA)
    for axis in (1, 2):
        length = x.shape[axis] - WINDOW + 1
        x = sum(
            float(weight) * jax.lax.slice_in_dim(x, start, start + length, axis=axis)
            for start, weight in enumerate(weights / weights.sum())
        )
    return x
