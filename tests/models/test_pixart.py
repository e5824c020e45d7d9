import dataclasses
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ldm_jax.models import weights
from ldm_jax.models.pixart import PixArt, positions
from ldm_jax.models.pixart_config import PixArtConfig
from ldm_jax.nn.functional import functional
from ldm_jax.nn.stack import Stack
from ldm_jax.types import Cond

DIRECTORIES = ("pixart", "pixart_sized")
TINY = PixArtConfig(width=12, depth=2, num_heads=3, text_width=5, sample_size=8)
SIZED = dataclasses.replace(TINY, size_conditioning=True)

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


def outputs_of(directory):
    with np.load(directory / "outputs.npz") as file:
        return dict(file)


@functools.cache
def opened(directory, dtype="float32"):
    config = PixArtConfig.from_diffusers(weights.read_config(directory), dtype)
    init, apply = functional(lambda rngs: PixArt(config, rngs))
    like = jax.eval_shape(init, jax.random.key(0))
    return config, weights.load(directory, like, config.names), apply


def answers(directory, given, dtype="float32"):
    _, params, apply = opened(directory, dtype)
    cond = Cond(given["tokens"], given["mask"], sizes=given["sizes"])
    seeing = cond._replace(mask=np.ones_like(cond.mask))
    return {
        name: predict(apply, params, given["latents"], given["told"], cond)
        for name, cond in (("masked", cond), ("unmasked", seeing))
    }


@functools.cache
def drawn(config, seed=0):
    """A network whose every weight is drawn at random, also where it starts at zero."""
    init, apply = functional(lambda rngs: PixArt(config, rngs))
    shapes = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        std = 0.3 if len(leaf.shape) < 3 else np.prod(leaf.shape[1:-1]) ** -0.5
        return std * rng.normal(size=leaf.shape).astype("f")

    return jax.tree.map(draw, shapes), apply


def inputs(batch=3, channels=4):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(batch, 4, 6, channels)).astype("f")
    tokens = rng.normal(size=(batch, 5, TINY.text_width)).astype("f")
    sizes = rng.uniform(20, 600, size=(batch, 6)).astype("f")
    return x, np.linspace(0, 900, batch, dtype="f"), Cond(tokens, sizes=sizes)


@functools.partial(jax.jit, static_argnums=0)
def predict(apply, params, x, told, cond):
    return apply(params, x, told, apply(params, cond, method="prepare"))


def error(ours, theirs):
    return np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))


@pytest.mark.parametrize("name", DIRECTORIES)
def test_it_answers_as_diffusers_does(diffusers_answers, name):
    expected = outputs_of(diffusers_answers / name)
    given = answers(diffusers_answers / name, expected)
    assert error(given["masked"], expected["unmasked"]) > 1e-3
    for output in ("unmasked", "masked"):
        assert error(given[output], expected[output]) < 1e-5, output


@pytest.mark.parametrize("name", DIRECTORIES)
def test_bfloat16_stays_near_float32_and_returns_float32(goldens, name):
    expected = outputs_of(goldens / name)
    given = answers(goldens / name, expected, "bfloat16")
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
    assert PixArtConfig.from_diffusers(weights.read_config(tmp_path)) == config


@pytest.mark.parametrize("name", DIRECTORIES)
def test_diffusers_opens_what_we_write_and_answers_alike(goldens, name, tmp_path):
    config, params, _ = opened(goldens / name)
    weights.save(tmp_path, params, config.names, config.to_diffusers())
    expected = outputs_of(goldens / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
        model, report = diffusers.PixArtTransformer2DModel.from_pretrained(
            tmp_path, output_loading_info=True
        )
        latents = torch.from_numpy(np.moveaxis(expected["latents"], -1, 1).copy())
        told, tokens, sizes = (
            torch.from_numpy(expected[key]) for key in ("told", "tokens", "sizes")
        )
        added = {"resolution": sizes[:, 4:], "aspect_ratio": sizes[:, 4:5] / sizes[:, 5:]}
        with torch.no_grad():
            sample = model(latents, tokens, told, added_cond_kwargs=added).sample.numpy()
    assert not any(report.values()), report
    assert error(np.moveaxis(sample, 1, -1)[..., :4], expected["unmasked"]) < 1e-6


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
    tokens = inputs()[2].tokens
    context = jax.jit(lambda tokens: apply(params, Cond(tokens), method="prepare"))(tokens)

    def dense(x, layer, at=...):
        return x @ layer["kernel"][at] + layer["bias"][at]

    mlp, blocks = params["caption_projection"], params["transformer_blocks"]["block"]
    hidden = np.asarray(jax.nn.gelu(dense(tokens, mlp["linear_1"])))
    text = dense(hidden, mlp["linear_2"])
    for prepared, name in zip(context.text, ("to_k", "to_v"), strict=True):
        assert prepared.shape == (3, TINY.depth, 5, TINY.num_heads, 4)
        for i in range(TINY.depth):
            in_place = dense(text, blocks["attn2"][name], i)
            np.testing.assert_allclose(prepared[:, i].reshape(3, 5, 12), in_place, atol=1e-5)


def test_scanned_blocks_are_blocks_one_after_another(monkeypatch):
    def in_turn(stack, call, x, each):
        graph, state = nnx.split(stack.block)
        for i in range(TINY.depth):
            layer, own = jax.tree.map(lambda leaf: leaf[i], (state, each))  # noqa: B023
            x, _ = call(nnx.merge(graph, layer), x, own)
        return x, None

    params, apply = drawn(TINY)
    scanned = predict(apply, params, *inputs())
    monkeypatch.setattr(Stack, "scan", in_turn)
    unrolled = jax.jit(lambda params: predict.__wrapped__(apply, params, *inputs()))(params)
    assert error(scanned, unrolled) < 1e-6


def test_every_array_of_a_context_has_the_batch_first():
    """So a context can be gathered, repeated and sharded like the prompts that it comes from."""
    params, apply = drawn(SIZED)
    cond = inputs()[2]._replace(mask=np.arange(5)[None] < np.array([[5], [2], [3]]))
    order = np.array([2, 0, 0, 1])
    prepare = jax.jit(lambda cond: apply(params, cond, method="prepare"))
    gathered = jax.tree.map(lambda array: array[order], prepare(cond))
    of_gathered = prepare(jax.tree.map(lambda array: array[order], cond))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gathered, of_gathered)


def test_examples_do_not_see_each_other_nor_tokens_behind_the_mask():
    params, apply = drawn(TINY)
    x, told, cond = inputs()
    cond = cond._replace(mask=np.arange(5)[None] < np.array([[3], [3], [3]]))
    first = predict(apply, params, x, told, cond)
    others = np.where(np.arange(3)[:, None, None, None] == 1, x, -x)
    hidden = cond._replace(tokens=np.where(cond.mask[:, :, None], cond.tokens, 7.0))
    second = predict(apply, params, others, told, hidden)
    np.testing.assert_allclose(first[1], second[1], atol=1e-5)
    assert error(first[0], second[0]) > 1e-2


@pytest.mark.parametrize(("place", "changes"), [(0, False), (3, False), (4, True), (5, True)])
def test_of_all_sizes_the_target_counts(place, changes):
    params, apply = drawn(SIZED)
    x, told, cond = inputs()
    sizes = np.where(np.arange(6)[None] == place, 77.0, cond.sizes)
    first, second = (
        predict(apply, params, x, told, cond._replace(sizes=given)) for given in (cond.sizes, sizes)
    )
    assert (error(first, second) > 1e-3) == changes


@pytest.mark.parametrize("sizes", [None, np.ones((3, 2), "f")])
def test_sizes_that_are_missing_are_asked_for(sizes):
    params, apply = drawn(SIZED)
    cond = inputs()[2]._replace(sizes=sizes)
    with pytest.raises(ValueError, match=r"cond.sizes must be \[B, 6\]"):
        apply(params, cond, method="prepare")


def test_inputs_that_it_cannot_take_are_refused():
    params, apply = drawn(TINY)
    x, told, cond = inputs()
    with pytest.raises(ValueError, match="no input for latents"):
        apply(params, cond._replace(concat=x), method="prepare")
    with pytest.raises(ValueError, match="latents of 4 x 5 cannot be cut into patches of 2 x 2"):
        predict(apply, params, x[:, :, :5], told, cond)


def test_channels_behind_those_of_the_latents_do_not_count():
    wide, apply_wide = drawn(TINY)
    _, apply = drawn(dataclasses.replace(TINY, out_channels=4))

    def narrowed(leaf):
        return leaf.reshape(*leaf.shape[:-1], 4, 8)[..., :4].reshape(*leaf.shape[:-1], 16)

    narrow = {**wide, "proj_out": jax.tree.map(narrowed, wide["proj_out"])}
    expected = predict(apply, narrow, *inputs())
    np.testing.assert_allclose(predict(apply_wide, wide, *inputs()), expected, atol=1e-5)


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


def test_it_starts_at_zero_and_every_parameter_can_leave_its_start():
    """Behind one zero after another: the last projection moves first, then what feeds it, then all.

    But for the bias of keys, which adds the same to all scores of a query, so softmax does not see it.
    """
    init, apply = functional(lambda rngs: PixArt(SIZED, rngs))
    params = jax.jit(init)(jax.random.key(0, impl="rbg"))
    x, told, cond = inputs()

    @jax.jit
    def step(params):
        def loss(params):
            y = predict(apply, params, x, told, cond)
            return jnp.mean(jnp.square(y - x)), y

        (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return y, jax.tree.map(lambda p, g: p - 0.01 * jnp.sign(g), params, gradient)

    before = params
    y, params = step(params)
    np.testing.assert_array_equal(y, 0)
    for _ in range(3):
        _, params = step(params)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, params)
    for attention in ("attn1", "attn2"):
        del moved["transformer_blocks"]["block"][attention]["to_k"]["bias"]
    assert all(jax.tree.leaves(moved)), moved


def test_rematerialisation_changes_neither_the_answer_nor_the_gradient():
    results = []
    for remat in ("none", "full"):
        params, apply = drawn(dataclasses.replace(TINY, remat=remat))

        def loss(params, apply=apply):
            return jnp.mean(jnp.square(predict(apply, params, *inputs())))

        results.append(jax.jit(jax.value_and_grad(loss))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


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
    assert f"{count(config) / 1e9:.3f}" == billions


@pytest.mark.parametrize("size_conditioning", [False, True])
def test_it_has_as_many_parameters_as_diffusers_network(size_conditioning):
    config = PixArtConfig(size_conditioning=size_conditioning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
        with torch.device("meta"):
            theirs = diffusers.PixArtTransformer2DModel.from_config(config.to_diffusers())
    assert count(config) == sum(parameter.numel() for parameter in theirs.parameters())


def count(config):
    init, _ = functional(lambda rngs: PixArt(config, rngs))
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))


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
