"""No fault of what stands beside the pixels changes the picture."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.images import size_of, to_square
from ldm_jax.data.sources import Skip
from ldm_jax.data.stripping import strip_metadata

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8)
UPRIGHT = PICTURE[8:32]
TURNED = np.rot90(PICTURE, -1)[:, 8:32]  # of orientation 6
LARGE = zlib.compress(b"x" * 2_000_000)


def encoded(kind, **options):
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, kind, **options)
    return file.getvalue()


def tiff(*entries):
    """A directory of tags, each (number, type, count, four bytes), as Exif has it."""
    tags = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + tags + bytes(4)


ORIENTATION = (0x112, 3, 1, b"\x06\0\0\0")
EXIF = tiff(ORIENTATION)
XMP = b'<x:xmpmeta tiff:Orientation="6"/>'


def chunk(name, data, checksum=0):
    total = zlib.crc32(name + data) ^ checksum
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", total)


def png(*chunks, after=False):
    """The picture with these chunks before or after its pixels."""
    whole = encoded("PNG")
    place = len(whole) - 12 if after else 33  # of IEND, and behind IHDR
    return whole[:place] + b"".join(chunks) + whole[place:]


FAULTS = {
    "zTXt of 2 MB": [chunk(b"zTXt", b"workflow\0\0" + LARGE)],
    "iTXt of 2 MB": [chunk(b"iTXt", b"workflow\0\1\0\0\0" + LARGE)],
    "XMP of 2 MB": [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE)],
    "iCCP of 2 MB": [chunk(b"iCCP", b"profile\0\0" + LARGE)],
    "texts of 66 MB": [chunk(b"tEXt", b"k\0" + bytes(2 << 20))] * 33,
    "unknown compression": [chunk(b"zTXt", b"k\0\7"), chunk(b"iCCP", b"k\0\7")],
    "cut iCCP": [chunk(b"iCCP", b"k\0")],
    "checksums": [chunk(b"tEXt", b"k\0v", 1), chunk(b"eXIf", tiff((0x112, 3, 1, b"\x03")), 1)],
    "eXIf of no Exif": [chunk(b"eXIf", b"nonsense")],
    "hexadecimal Exif": [chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 3\nxyz")],
    "short numbers": [chunk(name, b"") for name in (b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"acTL")],
    "names of Pillow's own": [chunk(b"tEXt", b"transparency\0x"), chunk(b"tEXt", b"interlace\0x")],
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_chunk_beside_the_pixels_of_a_png_costs_nothing(fault, after):
    file = png(*FAULTS[fault], after=after)
    np.testing.assert_array_equal(to_square(file, 24), UPRIGHT)
    assert size_of(file) == (24, 40)


def test_a_png_with_a_fault_is_still_turned_upright():
    exif = b"\nexif\n      32\n" + (b"Exif\0\0" + EXIF).hex().encode()
    for oriented in (
        chunk(b"eXIf", EXIF),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(exif)),
    ):
        file = png(*FAULTS["zTXt of 2 MB"], *FAULTS["checksums"], oriented)
        np.testing.assert_array_equal(to_square(file, 24), TURNED)


def test_a_png_that_is_cut_behind_its_pixels_is_whole_and_one_cut_in_them_is_not():
    file = png(chunk(b"tEXt", b"k\0" + bytes(100)), after=True)
    np.testing.assert_array_equal(to_square(file[:-60], 24), UPRIGHT)
    with pytest.raises(Skip, match="truncated or unreadable image"):
        to_square(encoded("PNG")[:-60], 24)


def test_a_fault_in_the_transparency_of_a_png_is_one_of_the_picture():
    with pytest.raises(Skip, match="truncated or unreadable image"):
        to_square(png(chunk(b"tRNS", b"\0")), 24)


SEGMENTS = {
    "profile": (0xE2, b"ICC_PROFILE\0"),
    "pictures": (0xE2, b"MPF\0nonsense"),
    "resources": (0xED, b"Photoshop 3.0\x008BIM\x04\x04"),
    "JFIF": (0xE0, b"JFIF\0"),
    "Adobe": (0xEE, b"Adobe"),
    "comment": (0xFE, bytes(60_000)),
}


@pytest.mark.parametrize("fault", SEGMENTS)
def test_a_fault_in_a_segment_beside_the_pixels_of_a_jpeg_costs_nothing(fault):
    whole = encoded("JPEG", exif=b"Exif\0\0" + EXIF)
    marker, data = SEGMENTS[fault]
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data
    expected = np.rot90(np.asarray(Image.open(io.BytesIO(whole))), -1)[:, 8:32]
    np.testing.assert_array_equal(to_square(whole[:2] + segment + whole[2:], 24), expected)


@pytest.mark.parametrize("inks", [None, (10, 200, 90, 40)])
def test_the_colour_space_of_a_jpeg_does_not_change(inks):
    image = Image.fromarray(PICTURE) if inks is None else Image.new("CMYK", (24, 40), inks)
    file = io.BytesIO()
    image.save(file, "JPEG", comment=b"a comment", icc_profile=b"a profile")
    stripped = strip_metadata(file.getvalue())
    assert b"comment" not in stripped and b"profile" not in stripped
    images = [Image.open(io.BytesIO(each)) for each in (file.getvalue(), stripped)]
    np.testing.assert_array_equal(*map(np.asarray, images))


@pytest.mark.parametrize(
    "odd",
    [
        (0x100, 2, 2, b"1\0\0\0"),  # a width that is text
        (0x10F, 99, 1, b"abcd"),  # a type that there is not
        (0x128, 2, 2, b"1\0\0\0"),
        (0x8769, 2, 4, b"abcd"),  # where the camera's own tags are
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_upright_whatever_its_other_tags_hold(kind, odd):
    options = {"lossless": True} if kind == "WEBP" else {}
    plain = encoded(kind, **options)
    turned = encoded(kind, exif=b"Exif\0\0" + tiff(*sorted([odd, ORIENTATION])), **options)
    expected = np.rot90(np.asarray(Image.open(io.BytesIO(plain))), -1)[:, 8:32]
    np.testing.assert_array_equal(to_square(turned, 24), expected)


def test_an_avif_with_broken_exif_is_turned_as_it_says_itself():
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 6, "a description"
    whole = encoded("AVIF", exif=exif)
    broken = whole.replace(b"MM\0*", b"XX\0*").replace(b"II*\0", b"XX*\0")
    assert broken != whole
    np.testing.assert_array_equal(to_square(broken, 24), to_square(whole, 24))
