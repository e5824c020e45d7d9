import dataclasses
import functools
import json
import runpy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import weights
from ldm_jax.models.uvit import Block, SkipBlock, UViT
from ldm_jax.models.uvit_config import UViTConfig
from ldm_jax.nn.functional import functional
from ldm_jax.nn.stack import Stack
from ldm_jax.types import Cond

TINY = UViTConfig(
    width=8, depth=4, num_heads=2, mlp_ratio=2, text_width=6, text_length=5, sample_size=4
)


@pytest.fixture(scope="module", params=["committed", "live"])
def answers_in_torch(request, goldens, tmp_path_factory):
    """The committed directory; and where torch is installed, a new one."""
    if request.param == "committed":
        return goldens / "uvit"
    directory = tmp_path_factory.mktemp("live")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch")
        runpy.run_path(str(goldens / "make_uvit_goldens.py"))["write"](directory, seed=1)
    return directory / "uvit"


def outputs_of(directory):
    with np.load(directory / "outputs.npz") as file:
        return dict(file)


@functools.cache
def opened(directory, dtype="float32"):
    config = UViTConfig.from_dict(weights.read_config(directory), dtype)
    init, apply = functional(lambda rngs: UViT(config, rngs))
    like = jax.eval_shape(init, jax.random.key(0))
    return config, weights.load(directory, like, config.names), apply


def answers(directory, given, dtype="float32"):
    _, params, apply = opened(directory, dtype)

    @jax.jit
    def predict(latents, mask):
        context = apply(params, Cond(given["tokens"], mask), method="prepare")
        return apply(params, latents, given["told"], context)

    return {
        "unmasked": predict(given["latents"], None),
        "masked": predict(given["latents"], given["mask"]),
        "resized": predict(given["others"], given["mask"]),
    }


def drawn(make, seed=0):
    """A network whose every weight is drawn at random, also where it starts at zero."""
    init, apply = functional(make)
    shapes = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        std = 0.3 if len(leaf.shape) < 2 else leaf.shape[-2] ** -0.5
        return std * rng.normal(size=leaf.shape).astype("f")

    return jax.tree.map(draw, shapes), apply


def tiny(**fields):
    return drawn(lambda rngs: UViT(dataclasses.replace(TINY, **fields), rngs))


def inputs(batch=3):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(batch, 4, 6, 4)).astype("f")
    tokens = rng.normal(size=(batch, 5, 6)).astype("f")
    return x, np.linspace(0, 900, batch, dtype="f"), tokens


def sequence():
    """Tokens as they enter the blocks, and which of them are seen."""
    x = np.random.default_rng(2).normal(size=(2, 9, TINY.width)).astype("f")
    return x, np.arange(9)[None] != np.array([[3], [4]])


def error(ours, theirs):
    return np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))


def test_it_answers_as_the_paper_written_in_torch_does(answers_in_torch):
    expected = outputs_of(answers_in_torch)
    given = answers(answers_in_torch, expected)
    assert error(given["masked"], expected["unmasked"]) > 1e-3
    for name, output in given.items():
        assert error(output, expected[name]) < 1e-5, name


def test_bfloat16_stays_near_float32_and_returns_float32(goldens):
    expected = outputs_of(goldens / "uvit")
    given = answers(goldens / "uvit", expected, "bfloat16")
    for name, output in given.items():
        assert output.dtype == jnp.float32
        assert error(output, expected[name]) < 0.05, name


def test_weights_and_config_survive_the_way_through_our_files_bit_for_bit(goldens, tmp_path):
    config, params, _ = opened(goldens / "uvit")
    weights.save(tmp_path, params, config.names, config.to_dict(), dtype="float16")
    again, params_again, _ = opened(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, params, params_again)


def test_scanned_blocks_answer_as_one_after_another():
    params, apply = tiny()
    x, mask = sequence()
    _, block = functional(lambda rngs: Block(TINY, rngs))
    _, skip_block = functional(lambda rngs: SkipBlock(TINY, rngs))

    def layer(name, i):
        return jax.tree.map(lambda leaf: leaf[i], params[name]["block"])

    first = block(layer("in_blocks", 0), x, mask)
    second = block(layer("in_blocks", 1), first, mask)
    y = block(params["mid_block"], second, mask)
    y = skip_block(layer("out_blocks", 0), y, mask, second)
    y = skip_block(layer("out_blocks", 1), y, mask, first)
    np.testing.assert_allclose(apply(params, x, mask, method="blocks"), y, rtol=1e-4, atol=1e-5)


def test_where_nothing_is_taken_from_the_first_half_it_is_a_plain_transformer():
    params, apply = tiny()
    x, mask = sequence()
    half, width = TINY.depth // 2, TINY.width
    own = np.concatenate([np.eye(width), np.zeros((width, width))]).astype("f")
    join = {"kernel": np.stack([own] * half), "bias": np.zeros((half, width), "f")}
    out = {**params["out_blocks"]["block"], "join": join}
    given = apply({**params, "out_blocks": {"block": out}}, x, mask, method="blocks")
    parts = (
        params["in_blocks"]["block"],
        jax.tree.map(lambda leaf: leaf[None], params["mid_block"]),
        {name: leaf for name, leaf in out.items() if name != "join"},
    )
    blocks = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    _, plain = functional(lambda rngs: Stack(lambda rngs: Block(TINY, rngs), TINY.depth + 1, rngs))
    expected = plain({"block": blocks}, x, mask)
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)
    assert error(apply(params, x, mask, method="blocks"), expected) > 1e-2


def test_every_parameter_can_leave_its_start():
    init, apply = functional(lambda rngs: UViT(TINY, rngs))
    params = jax.jit(init)(jax.random.key(0, impl="rbg"))  # which compiles in a third of the time
    x, told, tokens = inputs()

    @jax.jit
    def gradient(params):
        def loss(params):
            context = apply(params, Cond(tokens), method="prepare")
            return jnp.mean(jnp.square(apply(params, x, told, context) - x))

        return jax.grad(loss)(params)

    def moves(path, leaf):
        stacked = "'block'" in jax.tree_util.keystr(path)
        layers = leaf if stacked else leaf[None]
        return all(bool(np.any(layer != 0)) for layer in layers)

    moved = jax.tree_util.tree_map_with_path(moves, gradient(params))
    assert all(jax.tree.leaves(moved)), moved


def test_rematerialisation_changes_neither_the_answer_nor_the_gradient():
    x, told, tokens = inputs()
    results = []
    for remat in ("none", "full"):
        params, apply = tiny(remat=remat)

        def loss(params, apply=apply):
            context = apply(params, Cond(tokens), method="prepare")
            return jnp.mean(jnp.square(apply(params, x, told, context)))

        results.append(jax.jit(jax.value_and_grad(loss))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


def test_examples_do_not_see_each_other_nor_tokens_behind_the_mask():
    params, apply = tiny()
    x, told, tokens = inputs()
    mask = np.arange(5)[None] < np.array([[3], [3], [0]])

    @jax.jit
    def predict(x, told, tokens):
        return apply(params, x, told, apply(params, Cond(tokens, mask), method="prepare"))

    first = predict(x, told, tokens)
    others = np.where(np.arange(3)[:, None, None, None] == 1, x, -x)
    hidden = np.where(mask[:, :, None], tokens, 7.0)
    second = predict(others, told, hidden)
    np.testing.assert_allclose(first[1], second[1], atol=1e-5)
    assert error(first[0], second[0]) > 1e-2
    later = predict(x, told + 1, tokens)  # the time is seen also where no text is
    assert error(first[2], later[2]) > 1e-3


def test_every_array_of_a_context_has_the_batch_first():
    """So a context can be gathered, repeated and sharded like the prompts that it comes from."""
    params, apply = tiny()
    x, _, tokens = inputs()
    cond = Cond(tokens, np.arange(5)[None] < np.array([[5], [2], [3]]), concat=x)
    order = np.array([2, 0, 0, 1])
    prepare = jax.jit(lambda cond: apply(params, cond, method="prepare"))
    gathered = jax.tree.map(lambda array: array[order], prepare(cond))
    of_gathered = prepare(jax.tree.map(lambda array: array[order], cond))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gathered, of_gathered)


def test_concatenated_latents_are_further_channels_of_the_input():
    wide, apply_wide = tiny(in_channels=6)
    _, apply = tiny()
    x, told, tokens = inputs()
    kernel = wide["patch_embed"]["kernel"].reshape(4, 6, TINY.width)[:, :4].reshape(16, TINY.width)
    narrow = {**wide, "patch_embed": {**wide["patch_embed"], "kernel": kernel}}

    @jax.jit
    def predict_wide(concat):
        context = apply_wide(wide, Cond(tokens, concat=concat), method="prepare")
        return apply_wide(wide, x, told, context)

    expected = jax.jit(apply)(narrow, x, told, apply(narrow, Cond(tokens), method="prepare"))
    np.testing.assert_allclose(predict_wide(np.zeros((3, 4, 6, 2), "f")), expected, atol=1e-5)
    assert error(predict_wide(x[..., 2:]), expected) > 1e-2


@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (2, 10)])
def test_latents_of_any_size_that_patches_fit_into_keep_their_shape(shape):
    params, apply = tiny()
    _, told, tokens = inputs()
    x = np.zeros((3, *shape, 4), "f")
    context = apply(params, Cond(tokens[:, :3]), method="prepare")
    assert jax.eval_shape(apply, params, x, told, context).shape == x.shape


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        # Bao et al. 2022, on MS-COCO: U-ViT-S and its deeper variant.
        ({"width": 512, "depth": 12, "num_heads": 8, "text_width": 768}, "45M"),
        ({"width": 512, "depth": 16, "num_heads": 8, "text_width": 768}, "58M"),
        # Li et al. 2024 (arXiv:2412.12391).
        ({}, "2.3B"),
    ],
)
def test_published_configs_have_the_published_number_of_parameters(fields, count):
    config = UViTConfig(**fields)
    init, _ = functional(lambda rngs: UViT(config, rngs))
    leaves = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))
    number = sum(leaf.size for leaf in leaves)
    assert count == (f"{number / 1e9:.1f}B" if number > 1e9 else f"{number / 1e6:.0f}M")


def test_configs_survive_the_way_through_json():
    config = dataclasses.replace(TINY, dtype="bfloat16", remat="full")
    values = json.loads(json.dumps(config.to_dict()))
    assert UViTConfig.from_dict(values, "bfloat16", "full") == config
    with pytest.raises(ValueError, match="_class_name='UNet2DConditionModel' is not supported"):
        UViTConfig.from_dict({**values, "_class_name": "UNet2DConditionModel"})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"depth": 5}, "depth is 5; it is even and at least 2"),
        ({"depth": 0}, "depth is 0; it is even and at least 2"),
        ({"num_heads": 3}, "width 8 is not a multiple of num_heads 3"),
        ({"patch_size": 3}, "sample_size 4 is not a multiple of patch_size 3"),
    ],
)
def test_impossible_configs_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(TINY, **fields)


def test_inputs_that_do_not_fit_are_refused():
    params, apply = tiny()
    x, told, tokens = inputs()
    context = apply(params, Cond(tokens), method="prepare")
    with pytest.raises(ValueError, match="latents of 3 x 6 cannot be cut into patches of 2 x 2"):
        jax.eval_shape(apply, params, x[:, :3], told, context)
    with pytest.raises(ValueError, match="6 tokens a caption; this U-ViT has 5 positions"):
        apply(params, Cond(np.zeros((3, 6, 6), "f")), method="prepare")
