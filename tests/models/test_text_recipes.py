"""Recipes of pipelines: which text encoders they have, and how these become one condition."""

import pytest

from ldm_jax.models.clip import CLIPTextConfig
from ldm_jax.models.released import TEXT
from ldm_jax.models.t5 import T5Config
from ldm_jax.models.text import RECIPES, recipe_of

CLIP, T5 = CLIPTextConfig(), T5Config()


@pytest.mark.parametrize(
    ("pipeline", "encoders"),
    [
        ("StableDiffusionPipeline", [CLIP]),
        ("StableDiffusionXLPipeline", [CLIP, CLIP]),
        ("PixArtAlphaPipeline", [T5]),
    ],
)
def test_a_pipeline_is_known_by_its_class_and_where_that_is_not_told_by_its_encoders(
    pipeline, encoders
):
    assert recipe_of(encoders, pipeline) is recipe_of(encoders)
    assert pipeline in recipe_of(encoders).pipelines


@pytest.mark.parametrize(
    ("pipeline", "encoders", "said"),
    [
        ("StableDiffusion3Pipeline", [CLIP, CLIP], "is a StableDiffusion3Pipeline; supported are"),
        ("PixArtAlphaPipeline", [CLIP], "has the text encoders T5; given are CLIPText"),
        (None, [T5, CLIP], "no pipeline has the text encoders T5 and CLIPText"),
        (None, [], "no pipeline has the text encoders no encoder"),
    ],
)
def test_other_encoders_and_pipelines_are_refused_with_what_is_known(pipeline, encoders, said):
    with pytest.raises(ValueError, match=said):
        recipe_of(encoders, pipeline)


def test_every_released_pipeline_has_a_recipe():
    assert {recipe_of(encoders) for encoders in TEXT.values()} == set(RECIPES.values())
