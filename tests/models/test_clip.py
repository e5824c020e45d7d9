import dataclasses
import json
import runpy
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from specimens import drawn, error, outputs_of

from ldm_jax.models import clip, names, weights
from ldm_jax.nn.functional import functional

GOLDENS = Path(__file__).parent.parent / "goldens"
CLASSES = {
    "clip_text": (clip.CLIPText, clip.CLIPTextConfig, names.CLIP_TEXT),
    "clip_text_projected": (clip.CLIPText, clip.CLIPTextConfig, names.CLIP_TEXT),
    "clip_vision": (clip.CLIPVision, clip.CLIPVisionConfig, names.CLIP_VISION),
    "clip_vision_projected": (clip.CLIPVision, clip.CLIPVisionConfig, names.CLIP_VISION),
    "clip_both": (clip.CLIP, clip.CLIPConfig, names.CLIP),
}
TEXT = clip.CLIPTextConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=40,
    max_position_embeddings=9,
    eos_token_id=39,
)
VISION = clip.CLIPVisionConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
BOTH = clip.CLIPConfig(TEXT, VISION, projection_dim=8)


@pytest.fixture(scope="module", params=["committed", "live"])
def transformers_answers(request, tmp_path_factory):
    """Directories that transformers wrote: the committed ones, and with the extra `parity`, new ones."""
    if request.param == "committed":
        return GOLDENS
    pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp("live")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(GOLDENS / "make_clip_goldens.py"))["write"](directory, seed=1)
    return directory


def opened(directory, name, dtype="float32"):
    module, config_class, table = CLASSES[name]
    config = config_class.from_transformers(weights.read_config(directory / name), dtype)
    init, apply = functional(lambda rngs: module(config, rngs))
    like = jax.eval_shape(init, jax.random.key(0))
    return (
        config,
        weights.load(directory / name, like, table),
        jax.jit(apply, static_argnames="method"),
    )


def answers(apply, params, name, given):
    if name == "clip_both":
        return {
            "text_features": apply(params, given["tokens"], method="text_features"),
            "image_features": apply(params, given["images"], method="image_features"),
            "logits": apply(params, given["images"], given["tokens"]),
        }
    return apply(params, given["tokens" if "text" in name else "images"])._asdict()


@pytest.mark.parametrize("name", CLASSES)
def test_networks_answer_as_transformers_do(transformers_answers, name):
    expected = outputs_of(transformers_answers / name)
    _, params, apply = opened(transformers_answers, name)
    given = answers(apply, params, name, expected)
    compared = set(expected) - {"tokens", "images"}
    assert compared <= set(given) and compared
    for output in compared:
        assert error(given[output], expected[output]) < 1e-5, output


@pytest.mark.parametrize("name", ["clip_text", "clip_vision_projected"])
def test_bfloat16_stays_near_float32(name):
    expected = outputs_of(GOLDENS / name)
    _, params, apply = opened(GOLDENS, name, dtype="bfloat16")
    given = answers(apply, params, name, expected)
    for output in set(expected) - {"tokens", "images"}:
        assert error(given[output].astype(jnp.float32), expected[output]) < 0.05, output


@pytest.mark.parametrize("name", CLASSES)
def test_weights_survive_the_way_through_our_files_bit_for_bit(name, tmp_path):
    config, params, _ = opened(GOLDENS, name)
    weights.save(tmp_path / name, params, CLASSES[name][2], config.to_transformers())
    again, params_again, _ = opened(tmp_path, name)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, params, params_again)


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_opens_what_we_write_without_a_missing_or_unexpected_key(name, tmp_path):
    pytest.importorskip("torch")
    import transformers

    config, params, _ = opened(GOLDENS, name)
    weights.save(tmp_path, params, CLASSES[name][2], config.to_transformers())
    kind = json.loads((GOLDENS / name / "config.json").read_text())["architectures"][0]
    theirs = {}
    for directory in (GOLDENS / name, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, report = getattr(transformers, kind).from_pretrained(
                directory, output_loading_info=True
            )
        assert not any(report.values()), report
        theirs[directory] = {key: value.numpy() for key, value in model.state_dict().items()}
    first, second = theirs.values()
    assert first.keys() == second.keys()
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_old_files_with_stored_positions_load(tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(GOLDENS / "clip_text" / "model.safetensors")
    old = {f"text_model.{key}": tensor for key, tensor in tensors.items()}
    old["text_model.embeddings.position_ids"] = np.arange(9)[None]
    directory = tmp_path / "clip_text"
    directory.mkdir()
    save_file(old, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text((GOLDENS / "clip_text" / "config.json").read_text())
    jax.tree.map(
        np.testing.assert_array_equal,
        opened(tmp_path, "clip_text")[1],
        opened(GOLDENS, "clip_text")[1],
    )


def test_outputs_do_not_depend_on_later_tokens():
    params, apply = drawn(TEXT)
    tokens = jnp.array([[38, 1, 2, 3, 4, 5, 6, 7, 39], [38, 1, 2, 3, 9, 9, 9, 39, 39]])
    last = apply(params, tokens).last
    np.testing.assert_allclose(last[0, :4], last[1, :4], atol=1e-6)
    assert np.min(np.max(np.abs(last[0, 4:] - last[1, 4:]), axis=-1)) > 1e-3


def test_what_comes_after_the_end_token_does_not_change_the_features():
    params, apply = drawn(BOTH)
    tokens = jnp.array([[38, 1, 2, 39, 39, 39, 39, 39, 39], [38, 1, 2, 39, 0, 0, 5, 6, 7]])
    ended = apply(params, tokens, method="text_features")
    np.testing.assert_allclose(ended[0], ended[1], atol=1e-6)


@pytest.mark.slow
def test_it_learns_to_tell_images_apart_from_scratch():
    init, apply = functional(lambda rngs: clip.CLIP(BOTH, rngs))
    params = jax.jit(init)(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))
    tokens = jnp.full((8, 9), 39).at[:, 0].set(38).at[:, 1].set(jnp.arange(8))

    def loss(params):
        logits = apply(params, images, tokens)
        both = jax.nn.log_softmax(logits) + jax.nn.log_softmax(logits, axis=0)
        return -jnp.mean(jnp.diagonal(both)) / 2

    @jax.jit
    def descend(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    np.testing.assert_allclose(np.exp(params["logit_scale"]), 1 / 0.07, rtol=1e-6)
    tx = optax.adam(3e-3)
    state, values = tx.init(params), []
    for _ in range(60):
        params, state, value = descend(params, state)
        values.append(float(value))
    assert values[0] > np.log(8) / 2
    assert values[-1] < 0.1


def test_unit_norm_has_unit_norm():
    features = clip.unit_norm(jax.random.normal(jax.random.key(0), (3, 5)).astype(jnp.bfloat16))
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, rtol=1e-6)


@pytest.mark.parametrize("size", [(96, 96), (61, 90), (80, 50), (20, 24), (32, 47)])
def test_preprocessing_resizes_as_pillow_does_without_rounding(size):
    image = np.random.default_rng(0).uniform(0, 1, (*size, 3)).astype(np.float32)
    shape = tuple(32 * side // min(size) for side in size[::-1])
    left, top = ((side - 32) // 2 for side in shape)
    channels = [
        Image.fromarray(channel)
        .resize(shape, Image.Resampling.BICUBIC)
        .crop((left, top, left + 32, top + 32))
        for channel in np.moveaxis(image, -1, 0)
    ]
    expected = np.clip(np.stack(channels, axis=-1), 0, 1)
    given = jax.jit(clip.preprocess, static_argnums=1)(image[None] * 2 - 1, 32)[0]
    given = given * np.array(clip.STD)[None, None] + np.array(clip.MEAN)[None, None]
    np.testing.assert_allclose(given, expected, atol=1e-5)


def test_preprocessing_an_image_that_fits_only_normalises():
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1, maxval=1)
    given = clip.preprocess(images, 8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    np.testing.assert_allclose(given, images, atol=1e-6)


@pytest.mark.parametrize(
    "config", [TEXT, VISION, dataclasses.replace(TEXT, projection_dim=6), BOTH]
)
def test_configs_survive_the_way_through_json(config):
    values = json.loads(json.dumps(config.to_transformers()))
    assert type(config).from_transformers(values) == config


def test_the_content_of_old_config_files_is_read():
    old = {
        "text_config_dict": {"hidden_size": 8, "num_attention_heads": 2},
        "vision_config_dict": None,
    }
    config = clip.CLIPConfig.from_transformers({**old, "text_config": {"hidden_size": 512}})
    assert config.text.hidden_size == 8 and config.vision == clip.CLIPVisionConfig()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; it can be quick_gelu, gelu"),
        ({"hidden_size": 10, "num_attention_heads": 4}, "hidden_size 10 is not a multiple"),
    ],
)
def test_bad_configs_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        clip.CLIPTextConfig(**values)


def test_inputs_of_another_size_are_refused():
    params, apply = drawn(BOTH)
    for method, given, sentence in (
        ("text_features", jnp.zeros((1, 10), jnp.int32), "10 tokens a caption"),
        ("image_features", jnp.zeros((1, 8, 8, 3)), "takes \\(16, 16\\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            apply(params, given, method=method)
