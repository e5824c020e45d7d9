"""Removal of metadata from encoded images, because Pillow refuses a whole picture for one fault in its metadata."""

import io
import re
from collections.abc import Iterator

from PIL import Image

_PNG = b"\x89PNG\r\n\x1a\n"
_ONE_PIXEL = bytes.fromhex("0000000d 49484452 00000001 00000001 08 02 00 00 00 907753de")  # IHDR
_ORIENTED = (
    b"XML:com.adobe.xmp\0",
    b"Raw profile type exif\0",
)  # texts that may hold an orientation

# By the second byte of a marker. Kept are JFIF (0xE0), Exif and XMP (0xE1), and Adobe's colour space (0xEE).
_JPEG_SEGMENTS = {
    *range(0xC0, 0xD0),
    *range(0xDB, 0xFF),
}  # have a length, and stand before the scan
_JPEG_METADATA = {*range(0xE2, 0xEE), 0xEF, 0xFE}


def strip_metadata(file: bytes) -> bytes:
    """Returns a PNG, JPEG or AVIF without the metadata that does not change how its picture looks.

    Pixels, transparency and, as far as it can be read, orientation stay. Other formats are returned as they are.
    """
    if file.startswith(_PNG):
        return _PNG + b"".join(filter(_is_of_png_picture, _png_chunks(file)))
    if file.startswith(b"\xff\xd8"):
        return b"".join(filter(_is_of_jpeg_picture, _jpeg_segments(file)))
    if file[4:8] == b"ftyp":
        # An AVIF is turned by properties of its own, whatever its Exif says: the Exif item becomes a free one.
        return re.sub(rb"(infe\x02.{7})Exif", rb"\1free", file, count=1, flags=re.DOTALL)
    return file


def _png_chunks(file: bytes) -> Iterator[bytes]:
    """Yields each chunk with its length, name and checksum; the last one of a cut file is cut."""
    start = len(_PNG)
    while start < len(file):
        end = start + 12 + int.from_bytes(file[start : start + 4], "big")
        yield file[start:end]
        start = end


def _is_of_png_picture(chunk: bytes) -> bool:
    name, data = chunk[4:8], chunk[8:-4]
    if not name[:1].islower() or name == b"tRNS":  # a capital letter: no decoder may ignore it
        return True
    return (name == b"eXIf" or data.startswith(_ORIENTED)) and _is_readable(chunk)


def _is_readable(chunk: bytes) -> bool:
    """Returns whether Pillow opens an image that holds this chunk beside its pixels."""
    try:
        Image.open(io.BytesIO(_PNG + _ONE_PIXEL + chunk + b"\0\0\0\0IDAT"))
    except Exception:  # decoders raise whatever they ran into
        return False
    return True


def _jpeg_segments(file: bytes) -> Iterator[bytes]:
    """Yields the start, each segment before the first scan, and the rest."""
    yield file[:2]
    start = 2
    while len(file) >= start + 4 and file[start] == 0xFF and file[start + 1] in _JPEG_SEGMENTS:
        end = start + 2 + int.from_bytes(file[start + 2 : start + 4], "big")
        yield file[start:end]
        start = end
    yield file[start:]


def _is_of_jpeg_picture(segment: bytes) -> bool:
    marker = segment[1] if len(segment) > 1 else 0
    too_short = marker in (0xE0, 0xEE) and len(segment) < 16  # so that libjpeg ignores it as well
    return marker not in _JPEG_METADATA and not too_short
