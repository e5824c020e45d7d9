"""What pages share reads as people write it, and no text becomes markup."""

import base64
import io
import math

import numpy as np
import pytest
from PIL import Image

from ldm_jax.evals.image_grids import save_grid
from ldm_jax.files.flat import flat
from ldm_jax.pages import elements
from ldm_jax.types import Estimate


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.83149, "0.831"),
        (-24.56, "-24.6"),
        (999.4, "999"),
        (999.6, "1,000"),
        (12345.6, "12,346"),
        (1.2e-5, "1.2e-05"),
        (-1.11e-16, "0"),
        (math.inf, "inf"),
        (math.nan, "not a number"),
    ],
)
def test_numbers_have_three_digits_or_are_whole(value, text):
    assert elements.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.6, "1 min 0 s"), (460, "7 min 40 s"), (7384, "2 h 3 min")]
)
def test_times_are_in_their_two_largest_units(seconds, text):
    assert elements.duration(seconds) == text


def test_a_score_without_interval_says_so():
    assert "no interval, n = 1" in elements.estimate(Estimate(0.5, math.nan, math.nan, 1))
    assert "not known" in elements.estimate(None)


def test_headings_names_and_sentences_are_no_markup():
    text = elements.table(["<i>"], [["<b>", "<em>html</em>"]]) + elements.missing("<u>")
    assert not any(tag in text for tag in ("<i>", "<b>", "<u>"))
    assert "<td><em>html</em></td>" in text


def test_nested_settings_are_named_by_their_path():
    nested = {"sampler": {"name": "ddim", "ddim": {"eta": 0.0}}, "steps": 20}
    expected = [("sampler.name", "ddim"), ("sampler.ddim.eta", 0.0), ("steps", 20)]
    assert list(flat(nested)) == expected


def test_a_cut_grid_is_the_images_that_made_it(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (11, 5, 5, 3)).astype(np.uint8)
    save_grid(tmp_path / "grid.png", pixels)
    tiles = elements.cut_grid(tmp_path / "grid.png")
    np.testing.assert_array_equal(tiles[:11], pixels)
    assert (tiles[11:] == 255).all() and len(tiles) == 16


def test_an_address_holds_its_image():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    head, _, data = elements.data_address(Image.fromarray(pixels)).partition(",")
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), pixels
    )


def test_the_style_is_put_into_a_template_for_both_kinds_of_screen(tmp_path):
    (tmp_path / "page.html").write_text("<style>$style</style>$body")
    text = elements.fill(tmp_path / "page.html", body="here")
    assert "prefers-color-scheme: dark" in text and text.endswith("here")
