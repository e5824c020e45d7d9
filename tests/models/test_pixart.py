import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from specimens import SMALL, answer, drawn, error, inputs, num_params, opened

from ldm_jax.models import weights
from ldm_jax.models.pixart import positions
from ldm_jax.models.pixart_config import PixArtConfig
from ldm_jax.types import Cond

TINY, SIZED = SMALL["pixart without sizes"], SMALL["pixart"]

# The config.json of what was released; the 1024 pixel one does not say that it is told sizes.
RELEASED = {
    "_class_name": "Transformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "attention_type": "default",
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 16,
    "num_layers": 28,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 64,
    "upcast_attention": False,
}


def test_released_files_with_the_embedding_of_the_empty_text_load(goldens, tmp_path):
    config, params, _ = opened(goldens / "pixart")
    weights.save(tmp_path, params, config.names, config.to_diffusers())
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    empty = {"caption_projection.y_embedding": np.zeros((120, config.text_width), "f")}
    save_file({**load_file(file), **empty}, file)
    again = weights.load(tmp_path, params, config.names)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_keys_and_values_prepared_once_are_those_of_each_block():
    params, apply = drawn(TINY)
    tokens = inputs(TINY)[2].tokens
    context = apply(params, Cond(tokens), method="prepare")

    def dense(x, layer, at=...):
        return x @ layer["kernel"][at] + layer["bias"][at]

    mlp, blocks = params["caption_projection"], params["transformer_blocks"]["block"]
    hidden = np.asarray(jax.nn.gelu(dense(tokens, mlp["linear_1"])))
    text = dense(hidden, mlp["linear_2"])
    for prepared, name in zip(context.text, ("to_k", "to_v"), strict=True):
        assert prepared.shape == (3, TINY.depth, 5, TINY.num_heads, 12)
        for i in range(TINY.depth):
            in_place = dense(text, blocks["attn2"][name], i)
            np.testing.assert_allclose(prepared[:, i].reshape(3, 5, 24), in_place, atol=1e-5)


@pytest.mark.parametrize(("place", "changes"), [(0, False), (3, False), (4, True), (5, True)])
def test_of_all_sizes_the_target_counts(place, changes):
    params, apply = drawn(SIZED)
    x, told, cond = inputs(SIZED)
    sizes = np.where(np.arange(6)[None] == place, 77.0, cond.sizes)
    first, second = (
        answer(apply, params, x, told, cond._replace(sizes=given)) for given in (cond.sizes, sizes)
    )
    assert (error(first, second) > 1e-3) == changes


@pytest.mark.parametrize("sizes", [None, np.ones((3, 2), "f")])
def test_sizes_that_are_missing_are_asked_for(sizes):
    params, apply = drawn(SIZED)
    cond = inputs(SIZED)[2]._replace(sizes=sizes)
    with pytest.raises(ValueError, match=r"cond.sizes must be \[B, 6\]"):
        apply(params, cond, method="prepare")


def test_latents_that_cannot_be_cut_into_patches_are_refused():
    params, apply = drawn(TINY)
    x, told, cond = inputs(TINY)
    with pytest.raises(ValueError, match="latents of 4 x 5 cannot be cut into patches of 2 x 2"):
        answer(apply, params, x[:, :, :5], told, cond)


def test_channels_behind_those_of_the_latents_do_not_count():
    wide, apply_wide = drawn(TINY)
    _, apply = drawn(dataclasses.replace(TINY, out_channels=4))

    def narrowed(leaf):
        return leaf.reshape(*leaf.shape[:-1], 4, 8)[..., :4].reshape(*leaf.shape[:-1], 16)

    narrow = {**wide, "proj_out": jax.tree.map(narrowed, wide["proj_out"])}
    expected = answer(apply, narrow, *inputs(TINY))
    np.testing.assert_allclose(answer(apply_wide, wide, *inputs(TINY)), expected, atol=1e-5)


def test_a_finer_grid_has_the_positions_of_the_coarse_one_and_others_between():
    coarse = positions(3, 4, 5.0, 16).reshape(3, 4, 16)
    fine = positions(6, 12, 5.0, 16).reshape(6, 12, 16)
    np.testing.assert_allclose(fine[::2, ::3], coarse, atol=1e-5)
    assert len(np.unique(np.round(fine.reshape(-1, 16), 4), axis=0)) == 6 * 12


def test_positions_are_waves_of_the_column_then_of_the_row():
    given = positions(2, 8, 4.0, 4).reshape(2, 8, 4)
    row, column = np.meshgrid(np.arange(2) * 2.0, np.arange(8) * 0.5, indexing="ij")
    waves = [wave(at) for at in (column, row) for wave in (np.sin, np.cos)]
    np.testing.assert_allclose(given, np.stack(waves, axis=-1), atol=1e-6)


@pytest.mark.parametrize(
    ("values", "config"),
    [
        ({}, PixArtConfig()),
        ({"sample_size": 128}, PixArtConfig(sample_size=128, size_conditioning=True)),
        (
            {"sample_size": 128, "use_additional_conditions": False, "interpolation_scale": 1},
            PixArtConfig(sample_size=128, interpolation_scale=1.0),
        ),
        ({"out_channels": None}, PixArtConfig(out_channels=4)),
        ({"caption_channels": None}, PixArtConfig(caption_mlp=False, text_width=1152)),
    ],
)
def test_configs_of_what_was_released_are_understood(values, config):
    values = {**RELEASED, **values}
    assert PixArtConfig.from_diffusers(values) == config
    assert PixArtConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config


@pytest.mark.parametrize(
    ("side", "scale", "base"), [(32, 0.0, 16), (32, 0.5, 32), (64, 0.0, 32), (128, 0.0, 32)]
)
def test_released_networks_of_all_sizes_have_one_base(side, scale, base):
    assert PixArtConfig(sample_size=side, interpolation_scale=scale).base == base


# Li et al. 2024 (arXiv:2404.02883), table 2: parameters in billions, as printed and one digit further.
@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (PixArtConfig(), "0.611"),
        (PixArtConfig(text_width=1024), "0.607"),
        (PixArtConfig(text_width=1024, width=1536), "1.079"),
        (PixArtConfig(text_width=1024, width=1024, caption_mlp=False), "0.478"),
        (PixArtConfig(text_width=1024, width=1024, depth=56, caption_mlp=False), "0.948"),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(config, billions):
    assert f"{num_params(config) / 1e9:.3f}" == billions


@pytest.mark.parametrize("size_conditioning", [False, True])
def test_it_has_as_many_parameters_as_diffusers_network(size_conditioning):
    config = PixArtConfig(size_conditioning=size_conditioning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
        with torch.device("meta"):
            theirs = diffusers.PixArtTransformer2DModel.from_config(config.to_diffusers())
    assert num_params(config) == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"norm_type": "ada_norm_zero"}, "norm_type='ada_norm_zero' is not supported"),
        ({"cross_attention_dim": 768}, "cross_attention_dim=768 is not supported"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu' is not supported"),
    ],
)
def test_configs_that_ask_for_more_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        PixArtConfig.from_diffusers({**RELEASED, **values})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_heads": 7}, "width 1152 cannot be divided into 7 heads"),
        ({"width": 18, "num_heads": 2}, "width 18 cannot be divided into 4 sines and cosines"),
        ({"width": 1024, "size_conditioning": True}, "1024 cannot be divided into 3 embeddings"),
        ({"caption_mlp": False}, "text_width must be the width, 1152; it is 4096"),
        ({"out_channels": 3}, "out_channels 3 must not be less than in_channels 4"),
    ],
)
def test_impossible_configs_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        PixArtConfig(**fields)
