"""Every kind of image file comes out as the picture that it shows."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.images import to_square
from ldm_jax.data.sources import Skip


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def raw_png(width, height, depth, colour, rows):
    """A PNG from its parts, for what Pillow reads but does not write."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def smooth(rows, columns):
    """A picture without symmetry and without detail finer than an eighth of it."""
    y, x = np.mgrid[0:rows, 0:columns] / np.array([rows, columns])[:, None, None]
    planes = [x, y * x, 0.5 + 0.5 * np.sin(5 * x + 9 * y)]
    return (255 * np.stack(planes, -1)).round().astype(np.uint8)


def reason(image, **options):
    with pytest.raises(Skip) as skip:
        to_square(image, 32, **options)
    return skip.value.reason


UPRIGHT_TO_STORED = {  # how a camera that writes this orientation lays the picture down (Exif 2.3, tag 274)
    1: lambda picture: picture,
    2: np.fliplr,
    3: lambda picture: np.rot90(picture, 2),
    4: np.flipud,
    5: lambda picture: picture.swapaxes(0, 1),
    6: lambda picture: np.rot90(picture, 1),
    7: lambda picture: np.rot90(picture, 2).swapaxes(0, 1),
    8: lambda picture: np.rot90(picture, -1),
}


@pytest.mark.parametrize("orientation", UPRIGHT_TO_STORED)
def test_all_exif_orientations_show_the_same_upright_picture(orientation):
    upright = smooth(40, 60)
    stored = Image.fromarray(np.ascontiguousarray(UPRIGHT_TO_STORED[orientation](upright)))
    exif = Image.Exif()
    exif[274] = orientation
    shown = to_square(encoded(stored, exif=exif), 40)
    np.testing.assert_array_equal(shown, upright[:, 10:50])


def test_an_array_of_the_right_size_passes_unchanged():
    picture = smooth(64, 64)
    np.testing.assert_array_equal(to_square(picture, 64), picture)
    assert to_square(picture, 64).dtype == np.uint8


def test_greyscale_has_three_equal_channels():
    grey = smooth(32, 32)[:, :, 2]
    shown = to_square(encoded(Image.fromarray(grey)), 32)
    np.testing.assert_array_equal(shown, np.stack([grey] * 3, -1))


def test_bilevel_is_black_and_white():
    stripes = np.indices((32, 32))[0] // 8 % 2 == 1
    shown = to_square(encoded(Image.fromarray(stripes)), 32)
    np.testing.assert_array_equal(shown, np.stack([stripes * np.uint8(255)] * 3, -1))


def test_palette_colours_are_looked_up():
    palette = [(10, 20, 30), (200, 100, 50), (0, 255, 128)]
    which = np.indices((30, 30))[1] // 10
    image = Image.fromarray(which.astype(np.uint8), "L").convert("P")
    image.putpalette([channel for colour in palette for channel in colour])
    np.testing.assert_array_equal(to_square(encoded(image), 30), np.array(palette, np.uint8)[which])


def test_a_transparent_palette_entry_is_white():
    which = (np.indices((32, 32))[0] >= 16).astype(np.uint8)
    image = Image.fromarray(which, "L").convert("P")
    image.putpalette([1, 2, 3, 250, 0, 0])
    shown = to_square(encoded(image, transparency=1), 32)
    np.testing.assert_array_equal(shown[:16], np.full((16, 32, 3), (1, 2, 3)))
    np.testing.assert_array_equal(shown[16:], np.full((16, 32, 3), 255))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_composited_on_white(kind):
    colour, alpha = np.array([200, 40, 0]), 128
    rgba = np.full((32, 32, 4), (*colour, alpha), np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    shown = to_square(encoded(Image.fromarray(rgba), kind, **options), 32)
    expected = colour * alpha / 255 + 255 * (1 - alpha / 255)
    np.testing.assert_allclose(shown, np.broadcast_to(expected, shown.shape), atol=1)


def test_grey_with_alpha_is_composited_on_white():
    shown = to_square(encoded(Image.new("LA", (32, 32), (0, 51))), 32)
    np.testing.assert_allclose(shown, 255 * (1 - 51 / 255), atol=1)


@pytest.mark.parametrize(("kind", "tolerance"), [("TIFF", 1), ("JPEG", 3)])
def test_cmyk_inks_multiply(kind, tolerance):
    inks = (200, 30, 90, 40)
    shown = to_square(encoded(Image.new("CMYK", (32, 32), inks), kind), 32)
    cyan, magenta, yellow, black = np.array(inks) / 255
    expected = 255 * (1 - np.array([cyan, magenta, yellow])) * (1 - black)
    np.testing.assert_allclose(shown, np.broadcast_to(expected, shown.shape), atol=tolerance)


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF")])
def test_16_bit_grey_keeps_its_whole_range(mode, kind):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    values = ramp.astype(np.uint16 if mode == "I;16" else np.int32)
    image = Image.fromarray(values)
    assert image.mode == mode
    shown = to_square(encoded(image, kind), 64)
    np.testing.assert_allclose(shown[:, :, 0], ramp * 255 / 65535, atol=0.6)


def test_big_endian_16_bit_grey_keeps_its_whole_range():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(">u2")
    image = Image.frombytes("I;16B", (64, 64), ramp.tobytes())
    np.testing.assert_allclose(to_square(image, 64)[:, :, 0], ramp / 257.0, atol=0.6)


def test_16_bit_colour_keeps_its_whole_range():
    planes = np.stack([np.linspace(0, 65535, 64)] * 3, -1).astype(">u2")
    planes[:, 1] = planes[::-1, 1]
    png = raw_png(64, 64, depth=16, colour=2, rows=[planes.tobytes()] * 64)
    np.testing.assert_allclose(to_square(png, 64)[0], planes / 257.0, atol=1)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    file = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(to_square(file, 32), np.full((32, 32, 3), (255, 0, 0)))


@pytest.mark.parametrize("shape", [(100, 100), (256, 33), (40, 128), (16, 17)])
def test_a_constant_stays_constant_at_any_size(shape):
    picture = np.full((*shape, 3), (13, 200, 77), np.uint8)
    for size in (16, 50, 128):
        np.testing.assert_array_equal(
            to_square(picture, size), np.full((size, size, 3), (13, 200, 77))
        )


@pytest.mark.parametrize("factor", [2, 4, 3.2])
def test_a_linear_ramp_stays_linear(factor):
    side = round(80 * factor)
    ramp = np.broadcast_to(np.linspace(10, 240, side)[None, :, None], (side, side, 3))
    shown = to_square(ramp.round().astype(np.uint8), 80)
    centres = (np.arange(80) + 0.5) * factor - 0.5
    expected = 10 + 230 * centres / (side - 1)
    inside = slice(6, -6)  # the window is cut off at the border of the picture
    np.testing.assert_allclose(shown[40, inside, 0], expected[inside], atol=1.01)


def test_detail_finer_than_a_pixel_averages_out():
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    shown = to_square(np.stack([board] * 3, -1), 64)
    np.testing.assert_allclose(shown, 127.5, atol=2)


def test_the_centre_square_is_kept():
    thirds = np.zeros((50, 150, 3), np.uint8)
    for column in range(3):
        thirds[:, 50 * column : 50 * (column + 1), column] = 255
    np.testing.assert_array_equal(to_square(thirds, 50), np.full((50, 50, 3), (0, 255, 0)))
    standing = to_square(thirds.swapaxes(0, 1), 25)
    inside = slice(3, -3)  # the window looks across the border of the square
    np.testing.assert_array_equal(standing[inside], np.full((19, 25, 3), (0, 255, 0)))


def test_a_large_jpeg_shows_the_average_of_its_pixels():
    picture = smooth(1024, 1024)
    shown = to_square(encoded(Image.fromarray(picture), "JPEG", quality=95), 64)
    average = picture.reshape(64, 16, 64, 16, 3).mean((1, 3))
    inside = slice(2, -2)
    np.testing.assert_allclose(shown[inside, inside], average[inside, inside], atol=3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_truncated_file_is_skipped(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = encoded(Image.fromarray(noise), kind)
    assert reason(file[: len(file) // 2]) == "truncated or unreadable image"


def test_bytes_that_are_no_image_are_skipped():
    assert reason(b"<html>404 not found</html>") == "truncated or unreadable image"


def test_an_empty_file_is_skipped():
    assert reason(b"") == "empty file"


def test_a_small_image_is_skipped_by_its_shorter_side():
    assert reason(encoded(Image.new("RGB", (1, 1)))) == "image smaller than 16 pixels"
    assert reason(encoded(Image.new("RGB", (400, 15)))) == "image smaller than 16 pixels"
    assert reason(encoded(Image.new("RGB", (100, 100))), min_side=101).endswith("101 pixels")
    assert to_square(encoded(Image.new("RGB", (1, 1))), 8, min_side=1).shape == (8, 8, 3)


def test_a_decompression_bomb_is_skipped_before_it_is_decoded():
    bomb = raw_png(40_000, 40_000, depth=8, colour=2, rows=[])
    assert len(bomb) < 100
    assert reason(bomb) == "image of too many pixels"


def test_floating_point_pixels_are_skipped():
    assert reason(encoded(Image.new("F", (32, 32)), "TIFF")) == "floating-point pixels"
