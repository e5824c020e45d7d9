import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specimens import SMALL, drawn, inputs

from ldm_jax.models import unet_attention
from ldm_jax.models.unet_config import UNetConfig
from ldm_jax.nn.functional import functional

# The config.json of what was released, as far as it differs from diffusers' defaults.
SD1 = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "sample_size": 64,
}
SD2 = {
    **SD1,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "sample_size": 96,
    "upcast_attention": True,
}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "sample_size": 128,
}
BK_SDM_TINY = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "mid_block_type": None,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "sample_size": 64,
}
REFINER = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 1280,
    "use_linear_projection": True,
}


@pytest.mark.parametrize(
    ("values", "config"),
    [
        (SD1, UNetConfig(num_heads=8, text_width=768, use_linear_projection=False)),
        (SD2, UNetConfig(sample_size=96)),
        (
            BK_SDM_TINY,
            UNetConfig(
                channels=(320, 640, 1280),
                num_res_blocks=1,
                transformer_depth=(1, 1, 1),
                mid_depth=None,
                num_heads=8,
                text_width=768,
                use_linear_projection=False,
            ),
        ),
        (
            SDXL,
            UNetConfig(
                channels=(320, 640, 1280),
                transformer_depth=(0, 2, 10),
                mid_depth=10,
                text_width=2048,
                pooled_width=1280,
                sample_size=128,
            ),
        ),
    ],
)
def test_configs_of_what_was_released_are_understood(values, config):
    assert UNetConfig.from_diffusers(values).heads(1280) == config.heads(1280)
    assert UNetConfig.from_diffusers(values) == config
    assert UNetConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"addition_embed_type": "image"}, "addition_embed_type='image' is not supported"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift='scale_shift'"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"layers_per_block": [1, 2, 2, 2]}, "layers_per_block"),
        (REFINER, "SDXL's refiner is not supported: it is told of five numbers"),
        ({"attention_head_dim": [1, 2, 3, 4]}, "neither the number of heads nor their width"),
    ],
)
def test_configs_that_ask_for_more_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        UNetConfig.from_diffusers({**SD1, **values})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"channels": (320, 640)}, "must be of one length"),
        ({"channels": (320, 640, 1280, 1300)}, "1300 channels cannot be divided into heads of 64"),
        ({"num_heads": 7}, "320 channels cannot be divided into 7 heads"),
        ({"blocks": "vq"}, "blocks is 'vq'; allowed are stable_diffusion, deepfloyd"),
        (
            {"blocks": "deepfloyd", "transformer_depth": (0, 1, 2, 2)},
            r"transformer_depth is \(0, 1, 2, 2\).* have one attention",
        ),
    ],
)
def test_impossible_levels_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        UNetConfig(**fields)


@pytest.mark.parametrize("missing", ["pooled", "sizes"])
def test_a_prompt_without_what_conditions_is_refused(missing):
    params, apply = drawn(SMALL["unet"])
    cond = inputs(SMALL["unet"])[2]._replace(**{missing: None})
    with pytest.raises(ValueError, match=r"no cond\.pooled or no cond\.sizes"):
        apply(params, cond, method="prepare")


def test_a_middle_that_diffusers_cannot_express_is_not_written():
    config = UNetConfig(transformer_depth=(1, 1, 1, 2), mid_depth=1)
    with pytest.raises(ValueError, match="one depth for the middle and the lowest level"):
        config.to_diffusers()


def test_a_gated_layer_is_the_same_on_every_platform(monkeypatch):
    init, apply = functional(lambda rngs: unet_attention.GEGLU(8, "float32", rngs))
    params = init(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), "f")
    answers = []
    for name in ("cpu", "tpu"):
        monkeypatch.setattr(unet_attention, "platform", lambda name=name: name)
        answers.append(apply(params, x))
    np.testing.assert_allclose(*answers, rtol=1e-5, atol=1e-6)
