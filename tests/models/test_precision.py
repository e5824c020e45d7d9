"""What scores is computed in float32, also where a TPU's default is less."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core
from specimens import jitted, shapes

from ldm_jax.models import clip, dinov2
from ldm_jax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from ldm_jax.models.dinov2 import Dinov2Config
from ldm_jax.models.inception import InceptionConfig
from ldm_jax.models.lpips import LPIPSConfig

LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER = {**LAYERS, "intermediate_size": 24}
CLIP = CLIPConfig(
    CLIPTextConfig(**TOWER, vocab_size=40, max_position_embeddings=9, eos_token_id=39),
    CLIPVisionConfig(**TOWER, image_size=32, patch_size=8),
    projection_dim=8,
)
IMAGES, TOKENS = jnp.zeros((2, 32, 32, 3)), jnp.zeros((2, 9), jnp.int32)
LARGE = jnp.zeros((2, 75, 75, 3))
FACTORS = ("dot_general", "conv_general_dilated")  # what multiplies by rounded factors

# Config, method, arguments, and how many products there are at least.
NETWORKS = {
    "clip, images": (CLIP, "image_features", (IMAGES,), 10),
    "clip, text": (CLIP, "text_features", (TOKENS,), 9),
    "clip, both": (CLIP, "__call__", (IMAGES, TOKENS), 20),
    "dinov2": (Dinov2Config(**LAYERS, image_size=56), "__call__", (IMAGES,), 9),
    "dinov2, giant": (Dinov2Config(**LAYERS, use_swiglu_ffn=True), "__call__", (IMAGES,), 9),
    "inception": (InceptionConfig(divisor=16), "__call__", (LARGE,), 95),
    "lpips, alex": (LPIPSConfig("alex", divisor=32), "__call__", (IMAGES, IMAGES), 15),
    "lpips, vgg": (LPIPSConfig("vgg", divisor=32), "__call__", (IMAGES, IMAGES), 31),
}


def precisions(jaxpr):
    """Of every product in it and in what it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in FACTORS:
            yield equation.params["precision"]
        for inner in core.jaxprs_in_params(equation.params):
            yield from precisions(inner)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_product_rounds_its_factors(name):
    config, method, given, least = NETWORKS[name]

    def call(params):
        return jitted(config)(params, *given, method=method)

    found = list(precisions(jax.make_jaxpr(call)(shapes(config)).jaxpr))
    assert len(found) >= least
    assert set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize(
    "preprocess", [dinov2.preprocess, functools.partial(clip.preprocess, size=8)]
)
def test_neither_does_a_product_of_the_preprocessing(preprocess):
    found = list(precisions(jax.make_jaxpr(preprocess)(IMAGES).jaxpr))
    assert found and set(found) == {(jax.lax.Precision.HIGHEST,) * 2}
