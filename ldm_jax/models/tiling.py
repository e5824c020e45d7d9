"""Decoding of large latents tile by tile, in the memory of one tile."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ldm_jax.types import Images, Latent


def decode_tiled(
    decode: Callable[[Latent], Images], latents: Latent, *, tile: int, overlap: int, factor: int
) -> Images:
    """`decode(latents)` from tiles of `tile` rows and columns that overlap by at least `overlap`.

    Where tiles overlap, each fades out linearly towards its edge, as the weights of a mean. `factor` is the number of
    pixels to one row or column of the latents. For a decoder that looks at each place alone the result is exact;
    what a real one sees of the whole image ends at its tile.

    Raises:
      ValueError: not 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(
            f"tiles of {tile} cannot overlap by {overlap}; it is at least 0 and less than that"
        )
    batch, *sides, channels = latents.shape
    sizes = [min(tile, side) for side in sides]
    starts = [_starts(side, size, overlap) for side, size in zip(sides, sizes, strict=True)]
    places = np.stack(np.meshgrid(*starts, indexing="ij"), axis=-1).reshape(-1, 2)
    rows, columns = (_fade(size * factor, overlap * factor) for size in sizes)
    weight = (rows[:, None] * columns[None])[None, :, :, None]

    def add(sums: tuple[jax.Array, jax.Array], place: Int[jax.Array, "2"]) -> tuple:
        part = jax.lax.dynamic_slice(latents, (0, place[0], place[1], 0), (batch, *sizes, channels))
        tiles = decode(part) * weight, jnp.broadcast_to(weight, (1, *weight.shape[1:3], 1))
        at = (0, place[0] * factor, place[1] * factor, 0)
        return tuple(
            jax.lax.dynamic_update_slice(
                total, jax.lax.dynamic_slice(total, at, part.shape) + part, at
            )
            for total, part in zip(sums, tiles, strict=True)
        ), None

    outputs = jax.eval_shape(decode, latents).shape[-1]
    whole = [side * factor for side in sides]
    empty = jnp.zeros((batch, *whole, outputs)), jnp.zeros((1, *whole, 1))
    images, weights = jax.lax.scan(add, empty, jnp.asarray(places))[0]
    return images / weights


def _starts(side: int, size: int, overlap: int) -> Int[np.ndarray, " tiles"]:
    """Evenly from the first tile to the last, as few as overlap enough."""
    number = 1 + -(-(side - size) // max(1, size - overlap))
    return np.round(np.linspace(0, side - size, number)).astype(np.int32)


def _fade(pixels: int, overlap: int) -> Float[np.ndarray, " pixels"]:
    """1, but for a linear rise over `overlap` pixels at both ends."""
    if not overlap:
        return np.ones(pixels, np.float32)
    middle = np.arange(pixels) + 0.5
    return np.minimum(1, np.minimum(middle, pixels - middle) / overlap).astype(np.float32)
