"""Reference features: what a file says of itself, and what it refuses to be compared with."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.folder import Folder
from ldm_jax.data.images import to_square
from ldm_jax.evals.features import read_features, write_features
from ldm_jax.evals.references import Provenance, Reference, SourceImages

EXTRACTORS = {"clip": ("0123456789abcdef", "bicubic")}
FACTS = Provenance({"class": "Folder", "identity": "ab"}, 5, 1, 64, EXTRACTORS)
FEATURES = {"clip": {"image": np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)}}


def folder(path, sizes):
    for number, size in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
    return Folder(str(path))


def images_of(source, **options):
    return SourceImages(source, size=16, batch=3, workers=2, **options)


def test_what_is_written_is_read_again(tmp_path):
    Reference(FEATURES, FACTS).write(tmp_path / "deep" / "set.npz")
    found = Reference.read(tmp_path / "deep" / "set.npz")
    assert found.provenance == FACTS
    np.testing.assert_array_equal(found.features["clip"]["image"], FEATURES["clip"]["image"])


@pytest.mark.parametrize(
    ("size", "extractors", "said"),
    [
        (32, EXTRACTORS, "images of 64 pixels, and these have 32"),
        (64, {"clip": ("f" * 16, "bicubic")}, "another clip: 0123456789abcdef"),
        (64, {"clip": ("0123456789abcdef", "bilinear")}, r"here it is .* \(bilinear\)"),
    ],
)
def test_another_size_network_or_preprocessing_is_refused(size, extractors, said):
    with pytest.raises(ValueError, match=said):
        Reference(FEATURES, FACTS).require("set.npz", size=size, extractors=extractors)


def test_extractors_that_it_has_not_are_no_fault():
    more = EXTRACTORS | {"inception": ("f" * 16, "bilinear")}
    Reference(FEATURES, FACTS).require("set.npz", size=64, extractors=more)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_reference_is_named(tmp_path, content):
    path = tmp_path / "set.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} holds no features"):
        Reference.read(path)


def test_statistics_without_provenance_are_refused(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="holds no features that ldm_jax wrote"):
        Reference.read(path)
    write_features(path, FEATURES, {"other": "facts"})
    assert read_features(path)[1] == {"other": "facts"}
    with pytest.raises(ValueError, match="is no reference"):
        Reference.read(path)


def test_a_reference_takes_the_squares_in_the_middle_and_counts_what_it_leaves_out(tmp_path):
    source = folder(tmp_path, [(16, 16), (40, 20), (20, 40), (16, 16)])
    (tmp_path / "4.png").write_bytes(b"no image")
    source = dataclasses.replace(source)  # which lists the folder anew
    images = images_of(source)
    found = np.concatenate(list(images))
    expected = [to_square(source[number].image, 16) / np.float32(127.5) - 1 for number in range(4)]
    np.testing.assert_array_equal(found, expected)
    assert images.count == 4
    assert images.skipped == {"truncated or unreadable image": 1}


def test_images_of_prompts_are_taken_as_they_are_from_any_one_on(tmp_path):
    source = folder(tmp_path, [(16, 16)] * 5)
    found = np.concatenate(list(images_of(source, exact=True, start=2)))
    expected = [np.asarray(Image.open(tmp_path / f"{number}.png")) for number in (2, 3, 4)]
    np.testing.assert_array_equal(np.round((found + 1) * 127.5), expected)
    np.testing.assert_array_equal(images_of(source, exact=True)[4], found[2:])


def test_an_image_of_another_size_and_one_that_cannot_be_read_are_named(tmp_path):
    source = folder(tmp_path, [(16, 16), (16, 24)])
    with pytest.raises(ValueError, match=r"1\.png: 24 x 16 pixels, and images are to have 16"):
        list(images_of(source, exact=True))
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png: truncated or unreadable image"):
        list(images_of(dataclasses.replace(source), exact=True))
