"""Resizing against Pillow, TensorFlow, torch-fidelity and clean-fid."""

import runpy
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from sets import peer

from ldm_jax.metrics.resize import (
    as_clean_fid,
    as_torch_fidelity,
    resize_like_pillow,
    resize_like_tensorflow1,
    rounded,
    to_images,
)

GOLDENS = Path(__file__).parent.parent / "goldens"
# Up, down, one of both, by whole factors, of odd sides, of one side, and not at all.
SHAPES = [
    ((40, 40), (91, 91)),
    ((64, 64), (29, 29)),
    ((37, 53), (20, 91)),
    ((53, 37), (91, 20)),
    ((64, 32), (16, 64)),
    ((256, 256), (224, 224)),
    ((7, 1), (3, 5)),
    ((33, 9), (33, 4)),
    ((11, 13), (11, 13)),
]
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def draw(shape, count=2):
    """Noise of the largest contrast, which leaves the range wherever a filter can."""
    pixels = np.random.default_rng(0).normal(127.5, 150, (count, *shape, 3))
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def by_pillow(image, size, method):
    """Pillow, columns first: of a pass at a time no version chooses the order."""
    columns_done = image.resize((size[1], image.height), FILTERS[method])
    return columns_done.resize(size[::-1], FILTERS[method])


@pytest.mark.parametrize("method", FILTERS)
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_uint8_is_pillows_bit_for_bit(shape, size, method):
    pixels = draw(shape)
    expected = [np.asarray(by_pillow(Image.fromarray(image), size, method)) for image in pixels]
    answer = resize_like_pillow(pixels, size, method)
    assert answer.dtype == np.uint8
    np.testing.assert_array_equal(answer, expected)


@pytest.mark.parametrize("method", FILTERS)
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_floats_are_those_of_pillows_mode_f(shape, size, method):
    pixels = draw(shape).astype(np.float32)
    channels = np.moveaxis(pixels, -1, 1).reshape(-1, *shape)
    expected = [by_pillow(Image.fromarray(channel), size, method) for channel in channels]
    answer = np.moveaxis(resize_like_pillow(pixels, size, method), -1, 1)
    np.testing.assert_allclose(answer.reshape(-1, *size), expected, atol=1e-3)


@pytest.mark.parametrize("method", FILTERS)
def test_a_square_is_resized_as_one_call_of_pillow_does(method):
    pixels = draw((72, 72), 1)
    expected = Image.fromarray(pixels[0]).resize((32, 32), FILTERS[method])
    np.testing.assert_array_equal(resize_like_pillow(pixels, (32, 32), method)[0], expected)


def test_another_method_is_refused():
    with pytest.raises(ValueError, match="by bilinear or bicubic, not by 'nearest'"):
        resize_like_pillow(draw((4, 4)), (2, 2), "nearest")


def check_tensorflow1(expected):
    pixels = expected.pop("pixels")
    for name, answer in expected.items():
        size = tuple(map(int, name.split("x")))
        np.testing.assert_allclose(
            resize_like_tensorflow1(pixels, size), answer, atol=1e-4, err_msg=name
        )


def test_tensorflow1_is_imitated_as_torch_fidelity_does():
    with np.load(GOLDENS / "inception" / "resized.npz") as file:
        check_tensorflow1(dict(file))


def test_live_torch_fidelity_resizes_alike():
    pytest.importorskip("torch")
    make = runpy.run_path(str(GOLDENS / "make_inception_goldens.py"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answers = [
            (draw(shape), size, make["resized"](draw(shape), size)) for shape, size in SHAPES
        ]
    for pixels, size, answer in answers:
        check_tensorflow1({"pixels": pixels, "x".join(map(str, size)): answer})


@pytest.mark.slow
def test_tensorflow_itself_resizes_alike():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow as tf
    for shape, size in SHAPES:
        pixels = draw(shape)
        answer = tf.raw_ops.ResizeBilinear(images=pixels, size=size).numpy()
        check_tensorflow1({"pixels": pixels, "x".join(map(str, size)): answer})


def test_images_of_clean_fid_are_resized_as_pillows_floats_and_clipped():
    pixels = draw((40, 52))
    size = (61, 61)
    channels = np.moveaxis(pixels, -1, 1).reshape(-1, 40, 52).astype(np.float32)
    expected = [np.clip(by_pillow(Image.fromarray(c), size, "bicubic"), 0, 255) for c in channels]
    answer = np.moveaxis((as_clean_fid(to_images(pixels), size) + 1) * 127.5, -1, 1)
    np.testing.assert_allclose(answer.reshape(-1, *size), expected, atol=1e-3)
    assert np.min(expected) == 0 and np.max(expected) == 255


def test_live_clean_fid_resizes_alike():
    resizer = peer("cleanfid.resize").make_resizer("PIL", False, "bicubic", (61, 61))
    pixels = draw((40, 40))
    answer = (as_clean_fid(to_images(pixels), (61, 61)) + 1) * 127.5
    np.testing.assert_allclose(answer, [resizer(image) for image in pixels], atol=1e-3)


def test_images_become_the_nearest_of_256_values():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    images = np.asarray(to_images(values))
    assert images.min() == -1 and images.max() == 1
    for shift in (0, -0.49 / 127.5, 0.49 / 127.5):
        np.testing.assert_array_equal(rounded(images + np.float32(shift)), values)
    for outside, end in ((-1.5, 0), (3.0, 255)):
        assert np.all(rounded(np.full((1, 2, 2, 3), outside, np.float32)) == end)


def test_resizing_starts_from_256_values():
    images = np.random.default_rng(0).uniform(-1, 1, (1, 20, 20, 3)).astype("f")
    for resize in (as_torch_fidelity, as_clean_fid):
        saved = resize(to_images(rounded(images)), (9, 31))
        np.testing.assert_array_equal(resize(images, (9, 31)), saved)


@pytest.mark.parametrize("resize", [as_torch_fidelity, as_clean_fid])
def test_a_batch_that_devices_share_is_resized_alike(resize):
    mesh = jax.make_mesh((8,), ("data",))
    images = np.asarray(to_images(draw((20, 24), 8)))
    shared = jax.device_put(images, jax.NamedSharding(mesh, jax.P("data")))
    answer = jax.jit(lambda images: resize(images, (31, 31)))(shared)
    assert answer.sharding.spec[0] == "data"
    np.testing.assert_allclose(answer, resize(images, (31, 31)), atol=1e-6)
