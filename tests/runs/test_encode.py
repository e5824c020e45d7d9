"""Encoding says how well its autoencoder knows the images."""

import numpy as np
import tiny
from PIL import Image

from ldm_jax.data import open_source
from ldm_jax.evals.image_grids import RECONSTRUCTIONS
from ldm_jax.runs.encode import reconstruct
from ldm_jax.runs.run import Run


def test_noise_is_not_given_back_and_is_warned_of_but_scenes_are(tmp_path, caplog):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3))):
        Image.fromarray(pixels.astype(np.uint8)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text("noise")
    run = Run(tiny.TINY, tmp_path / "run")
    run.workdir.mkdir()
    reconstruct(run, open_source("scenes:simple?count=4"))
    assert not caplog.records
    told = reconstruct(run, open_source(f"folder:{photos}"))
    assert "over the first 3" in told and "below 20 dB, and no sample can be" in caplog.text
    with Image.open(run.workdir / RECONSTRUCTIONS) as image:
        pixels = np.asarray(image)
    np.testing.assert_array_equal(pixels[2:66, 2:66], np.asarray(Image.open(photos / "0.png")))
