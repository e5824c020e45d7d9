"""Backbones in directories: the committed ones, and where diffusers is installed new ones, as those who wrote them."""

import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from specimens import answer, error, opened, outputs_of

from ldm_jax.models import weights
from ldm_jax.models.networks import described
from ldm_jax.types import Cond

OF_DIFFUSERS = (
    "unet_sd1",
    "unet_sd2",
    "unet_sdxl",
    "unet_if",
    "unet_tiny",
    "pixart",
    "pixart_sized",
)


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_it_answers_as_diffusers_does(diffusers_answers, name):
    expected = outputs_of(diffusers_answers / name)
    _, params, apply = opened(diffusers_answers / name)
    x, told, tokens, mask = (expected[key] for key in ("latents", "told", "tokens", "mask"))

    def given(mask):
        cond = Cond(tokens, mask, expected.get("pooled"), expected["sizes"])
        return answer(apply, params, x, told, cond)

    assert error(given(mask), expected["unmasked"]) > 1e-3
    assert error(given(mask), expected["masked"]) < 1e-5
    assert error(given(np.ones_like(mask)), expected["unmasked"]) < 1e-5


@pytest.mark.parametrize("name", [*OF_DIFFUSERS, "uvit"])
def test_tensors_survive_the_way_through_our_files_bit_for_bit(goldens, name, tmp_path):
    config, params, _ = opened(goldens / name)
    kind, _ = described(goldens / name)
    weights.save(tmp_path, params, config.names, kind.write(config), dtype="float16")
    (theirs,), (ours,) = (
        [load_file(file) for file in directory.glob("*.safetensors")]
        for directory in (goldens / name, tmp_path)
    )
    assert ours.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert described(tmp_path) == (kind, config)


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_diffusers_opens_what_we_write_and_answers_alike(goldens, name, tmp_path):
    config, params, _ = opened(goldens / name)
    values, expected = config.to_diffusers(), outputs_of(goldens / name)
    weights.save(tmp_path, params, config.names, values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
        model, report = getattr(diffusers, values["_class_name"]).from_pretrained(
            tmp_path, output_loading_info=True
        )
        given = {key: torch.from_numpy(array) for key, array in expected.items()}
        added = {"text_embeds": given.get("pooled"), "time_ids": given["sizes"]}
        if name.startswith("pixart"):
            rows, columns = given["sizes"][:, 4:].split(1, dim=1)
            added = {"resolution": given["sizes"][:, 4:], "aspect_ratio": rows / columns}
        with torch.no_grad():
            sample = model(
                given["latents"].permute(0, 3, 1, 2),
                timestep=given["told"],
                encoder_hidden_states=given["tokens"],
                added_cond_kwargs=added,
            ).sample.permute(0, 2, 3, 1)
    assert not any(report.values()), report
    assert error(sample.numpy()[..., : config.predicted_channels], expected["unmasked"]) < 3e-6
