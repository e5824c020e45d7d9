import dataclasses
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ldm_jax.models import weights
from ldm_jax.models.unet import UNet
from ldm_jax.models.unet_config import UNetConfig
from ldm_jax.nn.functional import functional
from ldm_jax.types import Cond

DIRECTORIES = ("unet_sd1", "unet_sd2", "unet_sdxl", "unet_if")
TINY = UNetConfig(
    channels=(4, 8),
    transformer_depth=(0, 2),
    mid_depth=0,
    num_res_blocks=1,
    head_width=4,
    text_width=6,
    num_groups=2,
)
ONE_LEVEL = dataclasses.replace(TINY, channels=(4,), transformer_depth=(1,))

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


def outputs_of(directory):
    with np.load(directory / "outputs.npz") as file:
        return dict(file)


@functools.cache
def opened(directory, dtype="float32"):
    config = UNetConfig.from_diffusers(weights.read_config(directory), dtype)
    init, apply = functional(lambda rngs: UNet(config, rngs))
    like = jax.eval_shape(init, jax.random.key(0))
    return config, weights.load(directory, like, config.names), apply


@functools.cache
def predictor(directory, dtype="float32"):
    _, params, apply = opened(directory, dtype)

    @jax.jit
    def predict(latents, told, *cond):
        context = apply(params, Cond(*cond), method="prepare")
        return apply(params, latents, told, context)

    return predict


def answers(directory, given, dtype="float32"):
    latents, told, tokens, mask, *added = (
        given[name] for name in ("latents", "told", "tokens", "mask", "pooled", "sizes")
    )
    predict = predictor(directory, dtype)
    return {
        "masked": predict(latents, told, tokens, mask, *added),
        "unmasked": predict(latents, told, tokens, np.ones_like(mask), *added),
    }


def drawn(config, seed=0):
    """A network whose every weight is drawn at random, also where it starts at zero."""
    init, apply = functional(lambda rngs: UNet(config, rngs))
    shapes = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        std = 0.3 if len(leaf.shape) < 2 else np.prod(leaf.shape[:-1]) ** -0.5
        return std * rng.normal(size=leaf.shape).astype("f")

    return jax.tree.map(draw, shapes), apply


def inputs(batch=3, channels=4):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(batch, 4, 6, channels)).astype("f")
    tokens = rng.normal(size=(batch, 5, 6)).astype("f")
    return x, np.linspace(0, 900, batch, dtype="f"), tokens


def error(ours, theirs):
    return np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))


@pytest.mark.parametrize("name", DIRECTORIES)
def test_it_answers_as_diffusers_does(diffusers_answers, name):
    expected = outputs_of(diffusers_answers / name)
    given = answers(diffusers_answers / name, expected)
    assert error(given["masked"], expected["unmasked"]) > 1e-3
    for output in ("unmasked", "masked"):
        assert error(given[output], expected[output]) < 1e-5, output


def test_bfloat16_stays_near_float32_and_returns_float32(goldens):
    expected = outputs_of(goldens / "unet_sdxl")
    given = answers(goldens / "unet_sdxl", expected, "bfloat16")
    assert given["masked"].dtype == jnp.float32
    assert error(given["masked"], expected["masked"]) < 0.05


@pytest.mark.parametrize("name", DIRECTORIES)
def test_tensors_survive_the_way_through_our_files_bit_for_bit(goldens, name, tmp_path):
    config, params, _ = opened(goldens / name)
    weights.save(tmp_path, params, config.names, config.to_diffusers(), dtype="float16")
    theirs = load_file(goldens / name / "diffusion_pytorch_model.fp16.safetensors")
    ours = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert ours.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert UNetConfig.from_diffusers(weights.read_config(tmp_path)) == config


@pytest.mark.parametrize("name", DIRECTORIES)
def test_diffusers_opens_what_we_write_and_answers_alike(goldens, name, tmp_path):
    config, params, _ = opened(goldens / name)
    weights.save(tmp_path, params, config.names, config.to_diffusers())
    expected = outputs_of(goldens / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
        model, report = diffusers.UNet2DConditionModel.from_pretrained(
            tmp_path, output_loading_info=True
        )
        latents = torch.from_numpy(np.moveaxis(expected["latents"], -1, 1).copy())
        told, tokens, pooled, sizes = (
            torch.from_numpy(expected[key]) for key in ("told", "tokens", "pooled", "sizes")
        )
        added = {"text_embeds": pooled, "time_ids": sizes}
        with torch.no_grad():
            sample = model(latents, told, tokens, added_cond_kwargs=added).sample.numpy()
    assert not any(report.values()), report
    assert error(np.moveaxis(sample, 1, -1), expected["unmasked"]) < 1e-6


def test_every_array_of_a_context_has_the_batch_first():
    """So a context can be gathered, repeated and sharded like the prompts that it comes from."""
    params, apply = drawn(TINY)
    _, _, tokens = inputs()
    cond = Cond(
        tokens, np.arange(5)[None] < np.array([[5], [2], [3]]), concat=np.ones((3, 4, 6, 1))
    )
    order = np.array([2, 0, 0, 1])
    prepare = jax.jit(lambda cond: apply(params, cond, method="prepare"))
    gathered = jax.tree.map(lambda array: array[order], prepare(cond))
    of_gathered = prepare(jax.tree.map(lambda array: array[order], cond))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gathered, of_gathered)


def test_examples_do_not_see_each_other_nor_tokens_behind_the_mask():
    params, apply = drawn(ONE_LEVEL)
    x, told, tokens = inputs()
    mask = np.arange(5)[None] < np.array([[3], [3], [3]])

    @jax.jit
    def predict(x, tokens):
        return apply(params, x, told, apply(params, Cond(tokens, mask), method="prepare"))

    first = predict(x, tokens)
    others = np.where(np.arange(3)[:, None, None, None] == 1, x, -x)
    hidden = np.where(mask[:, :, None], tokens, 7.0)
    second = predict(others, hidden)
    np.testing.assert_allclose(first[1], second[1], atol=1e-5)
    assert error(first[0], second[0]) > 1e-2


def test_concatenated_latents_are_further_channels_of_the_input():
    wide, apply_wide = drawn(dataclasses.replace(ONE_LEVEL, in_channels=6))
    _, apply = drawn(ONE_LEVEL)
    kernel = wide["conv_in"]["kernel"][:, :, :4]
    narrow = {**wide, "conv_in": {**wide["conv_in"], "kernel": kernel}}
    x, told, tokens = inputs()

    @jax.jit
    def predict_wide(concat):
        context = apply_wide(wide, Cond(tokens, concat=concat), method="prepare")
        return apply_wide(wide, x, told, context)

    expected = jax.jit(apply)(narrow, x, told, apply(narrow, Cond(tokens), method="prepare"))
    np.testing.assert_allclose(predict_wide(np.zeros((3, 4, 6, 2), "f")), expected, atol=1e-5)
    assert error(predict_wide(x[..., 2:]), expected) > 1e-2


def test_it_starts_at_zero_and_every_parameter_can_leave_its_start():
    """Behind one zero after another: the last convolution moves first, then what feeds it, then all."""
    init, apply = functional(lambda rngs: UNet(ONE_LEVEL, rngs))
    params = jax.jit(init)(jax.random.key(0, impl="rbg"))  # which compiles in a third of the time
    x, told, tokens = inputs()

    @jax.jit
    def step(params):
        def loss(params):
            context = apply(params, Cond(tokens), method="prepare")
            y = apply(params, x, told, context)
            return jnp.mean(jnp.square(y - x)), y

        (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return y, jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)

    before = params
    y, params = step(params)
    np.testing.assert_array_equal(y, 0)
    for _ in range(3):
        _, params = step(params)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, params)
    assert all(jax.tree.leaves(moved)), moved


def test_rematerialisation_changes_neither_the_answer_nor_the_gradient():
    x, told, tokens = inputs()
    results = []
    for remat in ("none", "full"):
        params, apply = drawn(dataclasses.replace(ONE_LEVEL, remat=remat))

        def loss(params, apply=apply):
            context = apply(params, Cond(tokens), method="prepare")
            return jnp.mean(jnp.square(apply(params, x, told, context)))

        results.append(jax.jit(jax.value_and_grad(loss))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


@pytest.mark.parametrize(
    ("values", "config"),
    [
        (SD1, UNetConfig(num_heads=8, text_width=768, use_linear_projection=False)),
        (SD2, UNetConfig(sample_size=96)),
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
        ({"blocks": "vq"}, "blocks is 'vq'; it can be stable_diffusion, deepfloyd"),
        (
            {"blocks": "deepfloyd", "transformer_depth": (0, 1, 2, 2)},
            r"transformer_depth is \(0, 1, 2, 2\).* have one attention",
        ),
    ],
)
def test_impossible_levels_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        UNetConfig(**fields)


def test_a_prompt_without_the_sizes_that_condition_is_refused():
    params, apply = drawn(dataclasses.replace(ONE_LEVEL, pooled_width=5, size_width=4))
    _, _, tokens = inputs()
    with pytest.raises(ValueError, match=r"no cond\.pooled or no cond\.sizes"):
        apply(params, Cond(tokens, pooled=np.zeros((3, 5), "f")), method="prepare")


def test_a_middle_that_diffusers_cannot_express_is_not_written():
    config = UNetConfig(transformer_depth=(1, 1, 1, 2), mid_depth=1)
    with pytest.raises(ValueError, match="one depth for the middle and the lowest level"):
        config.to_diffusers()
