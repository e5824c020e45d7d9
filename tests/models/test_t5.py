import dataclasses
import functools
import json
import runpy
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from specimens import error, outputs_of

from ldm_jax.models import weights
from ldm_jax.models.t5 import T5Config, T5Encoder, relative_buckets
from ldm_jax.nn.functional import functional

TINY = T5Config(vocab_size=30, d_model=8, d_kv=6, d_ff=20, num_layers=2, num_heads=3)
EMBEDDING, OLD_EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"

# The config.json of PixArt's text encoder, as far as it differs from transformers' defaults.
XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "model_type": "t5",
}


@pytest.fixture(scope="module", params=["committed", "live"])
def directory(request, goldens, tmp_path_factory):
    """What transformers wrote: the committed directory, and where it is installed, a new one."""
    if request.param == "committed":
        return goldens / "t5"
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    new = tmp_path_factory.mktemp("live")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(goldens / "make_t5_goldens.py"))["write"](new, seed=1)
    return new / "t5"


@functools.cache
def encoder(config):
    init, apply = functional(lambda rngs: T5Encoder(config, rngs))
    return jax.eval_shape(init, jax.random.key(0)), jax.jit(apply)


def opened(directory, dtype="float32"):
    config = T5Config.from_transformers(weights.read_config(directory), dtype)
    like, apply = encoder(config)
    return config, weights.load(directory, like, config.names), apply


def test_it_answers_as_transformers_does(directory):
    """At every place, padding included, of captions shorter and longer than the farthest distance with a bias."""
    expected = outputs_of(directory)
    config, params, apply = opened(directory)
    assert expected["tokens"].shape[1] > config.relative_attention_max_distance
    last = apply(params, expected["tokens"], expected["mask"])
    assert error(last, expected["last"]) < 1e-5
    unmasked = apply(params, expected["tokens"], np.ones_like(expected["mask"]))
    assert error(unmasked[1:], expected["last"][1:]) > 0.1


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_bfloat16_stays_near_float32_and_returns_float32(goldens, stored):
    given = outputs_of(goldens / "t5")
    _, params, apply = opened(goldens / "t5")
    _, _, apply_half = opened(goldens / "t5", "bfloat16")
    params = jax.tree.map(lambda leaf: leaf.astype(stored), params)
    full = jax.tree.map(lambda leaf: leaf.astype("float32"), params)
    last = apply_half(params, given["tokens"], given["mask"])
    assert last.dtype == jnp.float32
    assert error(last, apply(full, given["tokens"], given["mask"])) < 0.05


def test_bfloat16_holds_sums_that_float16_cannot(goldens):
    expected = outputs_of(goldens / "t5")
    answers = []
    for dtype in ("float32", "bfloat16"):
        _, params, apply = opened(goldens / "t5", dtype)
        params["token_embedding"]["embedding"] *= 1e5
        params["blocks"]["block"]["feed_forward"]["wo"]["kernel"] *= 1e5
        answers.append(apply(params, expected["tokens"], expected["mask"]))
    assert error(answers[1], answers[0]) < 0.03


def test_neither_padding_nor_its_length_nor_other_captions_change_a_caption(goldens):
    expected = outputs_of(goldens / "t5")
    _, params, apply = opened(goldens / "t5")
    tokens, mask = expected["tokens"][:, :80], np.repeat(expected["mask"][1:2, :80], 3, axis=0)
    first = apply(params, tokens, mask)
    other = np.where(mask, tokens[[2, 1, 0]], 7)
    second = apply(params, np.pad(other, ((0, 0), (0, 59))), np.pad(mask, ((0, 0), (0, 59))))
    np.testing.assert_allclose(second[1, :70], first[1, :70], atol=1e-5)
    assert error(second[0, :70], first[0, :70]) > 0.1


def test_equal_tokens_are_told_apart_by_the_bias_alone(goldens):
    _, params, apply = opened(goldens / "t5")
    tokens, mask = np.full((1, 10), 5, np.int32), np.ones((1, 10), bool)
    tokens[0, 4] = 6  # among equal tokens alone, attention gives the same everywhere
    last = apply(params, tokens, mask)[0]
    assert min(error(last[i], last[j]) for i in range(10) for j in range(i)) > 1e-4
    params["position_bias"]["embedding"] *= 0
    equal = np.delete(apply(params, tokens, mask)[0], 4, axis=0)
    np.testing.assert_allclose(equal, np.repeat(equal[:1], 9, axis=0), atol=1e-6)


def test_tensors_survive_the_way_through_our_files_bit_for_bit(goldens, tmp_path):
    config, params, _ = opened(goldens / "t5")
    weights.save(tmp_path, params, config.names, config.to_transformers())
    theirs, ours = (load_file(path / "model.safetensors") for path in (goldens / "t5", tmp_path))
    assert ours.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    again, params_again, _ = opened(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, params, params_again)


def test_transformers_opens_what_we_write_and_answers_alike(goldens, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config, params, _ = opened(goldens / "t5")
    weights.save(tmp_path, params, config.names, config.to_transformers())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, report = transformers.T5EncoderModel.from_pretrained(
            tmp_path, output_loading_info=True
        )
    assert not any(report.values()), report
    expected = outputs_of(goldens / "t5")
    ids, mask = (torch.from_numpy(expected[name]).long() for name in ("tokens", "mask"))
    with torch.no_grad():
        last = model(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
    assert error(last, expected["last"]) < 3e-6


@pytest.mark.parametrize("kept", [(EMBEDDING,), (OLD_EMBEDDING,), (EMBEDDING, OLD_EMBEDDING)])
def test_the_encoder_of_a_whole_t5_is_read_under_all_names_of_its_embedding(
    goldens, tmp_path, kept
):
    tensors = load_file(goldens / "t5" / "model.safetensors")
    tensors |= dict.fromkeys(kept, tensors.pop(EMBEDDING))
    rest = {
        "decoder.final_layer_norm.weight": np.ones(8, "f"),
        "lm_head.weight": np.ones((30, 8), "f"),
    }
    save_file({**tensors, **rest}, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(goldens / "t5" / "config.json", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, opened(tmp_path)[1], opened(goldens / "t5")[1])


def test_initial_weights_have_the_sizes_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, vocab_size=500, d_model=32, d_kv=64, d_ff=96)
    init, _ = functional(lambda rngs: T5Encoder(config, rngs))
    params = jax.jit(init)(jax.random.key(0))
    weights.save(tmp_path, params, config.names, config.to_transformers())
    ours = load_file(tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.T5EncoderModel(transformers.T5Config(**config.to_transformers()))
    theirs = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_allclose(
            np.sqrt(np.mean(np.square(ours[key]))),
            np.sqrt(np.mean(np.square(theirs[key]))),
            rtol=0.5 if "bias" in key else 0.1,
        )


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (12, 100)])
def test_buckets_are_those_of_transformers(num_buckets, max_distance):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    offset = np.arange(-600, 601)
    theirs = t5.T5Attention._relative_position_bucket(
        torch.from_numpy(offset), True, num_buckets, max_distance
    )
    np.testing.assert_array_equal(relative_buckets(offset, num_buckets, max_distance), theirs)


def test_buckets_are_exact_nearby_and_double_in_length_farther_on():
    """With 32 buckets up to 128: distances 0 to 7 have one each, 8 to 127 eight, two for each doubling."""
    first = [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]  # 8 * 2^(i/2), rounded up
    expected = np.searchsorted(first, np.arange(300), side="right") - 1
    before, after = (relative_buckets(sign * np.arange(300), 32, 128) for sign in (-1, 1))
    np.testing.assert_array_equal(before, expected)
    np.testing.assert_array_equal(after[1:], expected[1:] + 16)


def test_configs_survive_the_way_through_json():
    config = dataclasses.replace(TINY, relative_attention_num_buckets=8, layer_norm_epsilon=1e-5)
    values = json.loads(json.dumps(config.to_transformers()))
    assert T5Config.from_transformers(values) == config


def test_the_config_of_what_was_released_is_read():
    config = T5Config.from_transformers(XXL)
    like, _ = encoder(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(like)) == 4_762_310_656


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "feed_forward_proj='relu' is not supported"),
        ({**XXL, "feed_forward_proj": "gated-silu"}, "only feed_forward_proj='gated-gelu' is"),
        ({**XXL, "model_type": "umt5"}, "model_type='umt5' is not supported"),
    ],
)
def test_networks_of_another_kind_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        T5Config.from_transformers(values)


def test_float16_is_refused():
    with pytest.raises(ValueError, match="dtype of T5 is 'float16'; it can be float32, bfloat16"):
        T5Config.from_transformers(XXL, "float16")
