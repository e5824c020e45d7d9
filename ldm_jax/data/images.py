"""Any image file to a square of 8-bit RGB, or the reason why not."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from ldm_jax.data.sources import Skip
from ldm_jax.data.stripping import strip_metadata

# Endings of the names of image files; of several files of one sample the first ending counts.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".jfif", ".jpe", ".apng", ".jp2")
ENDINGS += (".bmp", ".dib", ".gif", ".tif", ".tiff")

_UPRIGHT = {  # by the Exif orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_square(
    image: bytes | np.ndarray | Image.Image, size: int, *, min_side: int = 16
) -> UInt8[np.ndarray, "size size 3"]:
    """The centre of an image at `size` pixels, upright, in RGB; transparent parts become white.

    The Exif orientation is applied, 16-bit grey is scaled to 8 bits, and the largest square in the centre is
    resized by Lanczos' windowed sinc, which averages over all the pixels that fall into one. Broken metadata is
    ignored.

    Args:
      image: an encoded file, uint8 pixels [rows, columns, 3], or an opened Pillow image.
      size: side of the result, in pixels; smaller images are enlarged.
      min_side: the fewest pixels the shorter side may have.

    Raises:
      Skip: for what is empty, truncated, not an image, too small, or large enough to be an attack.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    try:
        opened = _open(image) if isinstance(image, bytes) else image
        if min(opened.size) < min_side:
            raise Skip(f"image smaller than {min_side} pixels")
        # A JPEG decodes to a half, quarter or eighth of its size at a fraction of the cost. What is left is at
        # least twice the result's size, so the resize below still decides what the result looks like.
        opened.draft(None, (2 * size, 2 * size))
        upright = _to_rgb(_turn_upright(opened))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Skip("image of too many pixels") from None
    except (Skip, MemoryError):
        raise
    except Exception:  # on bytes that are no image decoders raise whatever they ran into
        raise Skip("truncated or unreadable image") from None
    return np.array(ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS))


def size_of(image: bytes | np.ndarray) -> tuple[int, int]:
    """Columns and rows of an encoded file, or of pixels. Raises Skip for what is no image."""
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    try:
        return _open(image).size
    except Skip:
        raise
    except Exception:  # as in `to_square`
        raise Skip("truncated or unreadable image") from None


def _open(file: bytes) -> Image.Image:
    if not file:
        raise Skip("empty file")
    return Image.open(io.BytesIO(strip_metadata(file)))


def _turn_upright(image: Image.Image) -> Image.Image:
    image.load()  # apart from the Exif, because a fault of the pixels is one of the picture
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Exif that cannot be read says nothing of an orientation
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise Skip("floating-point pixels")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _to_8_bits(grey: np.ndarray) -> UInt8[np.ndarray, "rows columns"]:
    """Pillow has 16-bit grey as "I;16" (and its byte orders) or as "I", whose own conversion clips at 255."""
    values = np.clip(grey.astype(np.int64), 0, 65535)
    return ((values * 255 + 32767) // 65535).astype(np.uint8)
