import dataclasses
import functools
import json
import runpy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from specimens import error, outputs_of

from ldm_jax.models import dinov2, weights
from ldm_jax.models.dinov2 import Dinov2, Dinov2Config
from ldm_jax.nn.functional import functional

FORMS = ("mlp", "swiglu")
SIZES = ("trained", "smaller", "larger", "oblong")
LARGE = Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518)


def written_by_transformers(goldens, directory, **options):
    """New directories, with the extra `parity`."""
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make = runpy.run_path(str(goldens / "make_dinov2_goldens.py"))
        make["write"](directory, seed=1, **options)
    return directory


@pytest.fixture(scope="module", params=["committed", "live"])
def transformers_answers(request, goldens, tmp_path_factory):
    if request.param == "committed":
        return goldens / "dinov2"
    return written_by_transformers(goldens, tmp_path_factory.mktemp("live"))


@functools.cache
def opened(directory, dtype="float32"):
    config = Dinov2Config.from_transformers(weights.read_config(directory), dtype)
    init, apply = functional(lambda rngs: Dinov2(config, rngs))
    like = jax.eval_shape(init, jax.random.key(0))
    return config, weights.load(directory, like, config.names), jax.jit(apply)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_class_tokens_are_those_of_transformers(transformers_answers, form, size):
    expected = outputs_of(transformers_answers / form)
    _, params, apply = opened(transformers_answers / form)
    given = apply(params, expected[f"{size}_images"])
    assert error(given, expected[f"{size}_features"]) < 1e-5


@pytest.mark.full_size
def test_class_tokens_of_a_wide_network_are_those_of_transformers(goldens, tmp_path):
    options = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
    directory = written_by_transformers(
        goldens, tmp_path, **options, mlp_ratio=4, patch_size=7, image_size=259
    )
    for form in FORMS:
        _, params, apply = opened(directory / form)
        expected = outputs_of(directory / form)
        for size in ("larger", "oblong"):
            given = apply(params, expected[f"{size}_images"])
            assert error(given, expected[f"{size}_features"]) < 1e-4, (form, size)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_stays_near_float32_and_returns_float32(goldens, form):
    expected = outputs_of(goldens / "dinov2" / form)
    _, params, apply = opened(goldens / "dinov2" / form, "bfloat16")
    given = apply(params, expected["oblong_images"])
    assert given.dtype == jnp.float32
    assert error(given, expected["oblong_features"]) < 0.05


@pytest.mark.parametrize("form", FORMS)
def test_tensors_survive_the_way_through_our_files_bit_for_bit(goldens, form, tmp_path):
    config, params, _ = opened(goldens / "dinov2" / form)
    weights.save(tmp_path, params, config.names, config.to_transformers())
    theirs = load_file(goldens / "dinov2" / form / "model.safetensors")
    del theirs["embeddings.mask_token"]
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert opened(tmp_path)[0] == config


@pytest.mark.parametrize("form", FORMS)
def test_transformers_opens_what_we_write_and_answers_alike(goldens, form, tmp_path):
    config, params, _ = opened(goldens / "dinov2" / form)
    weights.save(tmp_path, params, config.names, config.to_transformers())
    expected = outputs_of(goldens / "dinov2" / form)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
        import transformers

        model, report = transformers.Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
        images = torch.from_numpy(np.moveaxis(expected["oblong_images"], -1, 1).copy())
        given = model(images).pooler_output.detach().numpy()
    assert not any(report.values()), report
    assert error(given, expected["oblong_features"]) < 1e-6


@pytest.mark.parametrize("grid", [(16, 16), (3, 20), (10, 9)])
def test_position_embeddings_are_as_symmetric_on_every_grid_as_they_were(grid):
    """Equal ones stay equal up to the edge, and a mirrored grid is mirrored."""
    interpolate = jax.jit(dinov2.interpolate, static_argnums=1)
    positions = np.random.default_rng(0).normal(size=(9, 9, 2)).astype("f")
    given = interpolate(positions, grid)
    assert given.shape == (*grid, 2)
    np.testing.assert_allclose(
        interpolate(positions[::-1, ::-1], grid), given[::-1, ::-1], atol=1e-5
    )
    np.testing.assert_allclose(interpolate(np.full_like(positions, 0.7), grid), 0.7, rtol=1e-5)


def test_without_positions_the_order_of_patches_does_not_matter(goldens):
    """Attention is a set's; what tells patches apart is their position."""
    _, params, apply = opened(goldens / "dinov2" / "mlp")
    embeddings = params["embeddings"]
    zeros = jnp.zeros_like(embeddings["position_embeddings"])
    params = {**params, "embeddings": {**embeddings, "position_embeddings": zeros}}
    images = np.random.default_rng(0).normal(size=(2, 20, 20, 3)).astype("f")
    np.testing.assert_allclose(
        apply(params, np.roll(images, 8, 1)), apply(params, images), atol=1e-5
    )


@pytest.mark.parametrize("size", [(64, 64), (40, 70), (20, 24), (28, 28)])
def test_preprocessing_resizes_to_a_square_as_pillow_does_without_rounding(size):
    image = np.random.default_rng(0).uniform(0, 1, (*size, 3)).astype("f")
    channels = [
        Image.fromarray(channel).resize((28, 28), Image.Resampling.BICUBIC)
        for channel in np.moveaxis(image, -1, 0)
    ]
    expected = np.clip(np.stack(channels, axis=-1), 0, 1)
    given = jax.jit(dinov2.preprocess, static_argnums=1)(image[None] * 2 - 1, 28)[0]
    given = given * np.array(dinov2.STD)[None, None] + np.array(dinov2.MEAN)[None, None]
    np.testing.assert_allclose(given, expected, atol=1e-5)


def test_preprocessing_is_for_224_pixels_unless_it_is_told_otherwise():
    assert dinov2.preprocess(jnp.zeros((1, 4, 6, 3))).shape == (1, 224, 224, 3)


@pytest.mark.parametrize(
    "config", [LARGE, Dinov2Config(qkv_bias=False, use_swiglu_ffn=True, layerscale_value=1e-5)]
)
def test_configs_survive_the_way_through_json(config):
    values = json.loads(json.dumps(config.to_transformers()))
    assert Dinov2Config.from_transformers(values) == config
    assert Dinov2Config.from_transformers(values, "bfloat16") == dataclasses.replace(
        config, dtype="bfloat16"
    )


def test_the_large_network_has_as_many_parameters_as_was_published():
    """304 million, of which the mask token's 1024 are not here."""
    init, _ = functional(lambda rngs: Dinov2(LARGE, rngs))
    leaves = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))
    assert sum(leaf.size for leaf in leaves) == 304_368_640 - 1024


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported; only hidden_act='gelu' is"),
        ({"num_channels": 1}, "num_channels=1 is not supported"),
        ({"hidden_size": 10, "num_attention_heads": 4}, "hidden_size 10 is not a multiple"),
        ({"image_size": 8}, "image_size 8 is less than patch_size 14"),
    ],
)
def test_bad_configs_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Dinov2Config.from_transformers(values)


def test_images_without_a_patch_are_refused(goldens):
    _, params, apply = opened(goldens / "dinov2" / "mlp")
    with pytest.raises(ValueError, match=r"images are \(3, 8\) pixels; .* take 4"):
        apply(params, jnp.zeros((1, 3, 8, 3)))
