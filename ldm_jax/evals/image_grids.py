"""Images side by side, as one picture."""

import io

import numpy as np
from einops import rearrange
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from ldm_jax.files.durable import naming
from ldm_jax.types import Pixels

RECONSTRUCTIONS = "reconstructions.png"  # of images of the data, in a run's directory


def image_grid(pixels: Pixels, columns: int, gap: int = 2) -> UInt8[np.ndarray, "height width 3"]:
    """Images row by row, on white."""
    missing = -len(pixels) % columns
    pixels = np.pad(pixels, ((0, missing), (0, gap), (0, gap), (0, 0)), constant_values=255)
    grid = rearrange(pixels, "(r c) h w rgb -> (r h) (c w) rgb", c=columns)
    return np.pad(grid, ((gap, 0), (gap, 0), (0, 0)), constant_values=255)


def save_grid(path: epath.PathLike, pixels: Pixels, columns: int = 8) -> None:
    """Writes images side by side as one PNG."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, image_grid(pixels, columns))


def save_png(path: epath.PathLike, pixels: UInt8[np.ndarray, "height width 3"]) -> None:
    """Writes one image, into a bucket too."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    with naming(path):
        epath.Path(path).write_bytes(stream.getvalue())
