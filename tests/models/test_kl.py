import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from specimens import error, outputs_of

from ldm_jax.models import weights
from ldm_jax.models.kl import AutoencoderKL, KLConfig
from ldm_jax.nn.functional import functional

FILE = "diffusion_pytorch_model.fp16.safetensors"
TINY = KLConfig(channels=(4,), num_groups=2, layers_per_block=1)

# The config.json of what was released, as far as it differs from diffusers' defaults.
FOUR = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}
SD = {**FOUR, "sample_size": 512}
SDXL = {**FOUR, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
SD3 = {
    **SDXL,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
    "latents_mean": None,
}


@functools.cache
def opened(directory, dtype="float32"):
    config = KLConfig.from_diffusers(weights.read_config(directory), dtype)
    init, apply = functional(lambda rngs: AutoencoderKL(config, rngs))
    like = jax.eval_shape(init, jax.random.key(0))
    return config, weights.load(directory, like, config.names), apply


def answers(apply, params, given):
    @jax.jit
    def both(params, images, latents):
        mean, logvar = apply(params, images, method="encode")
        decoded = apply(params, latents, method="decode")
        mode = apply(params, images, method="encode_mode")
        return {"mean": mean, "logvar": logvar, "decoded": decoded, "mode": mode}

    return both(params, given["images"], given["latents"])


def test_it_encodes_and_decodes_as_diffusers_does(diffusers_answers):
    expected = outputs_of(diffusers_answers / "kl")
    config, params, apply = opened(diffusers_answers / "kl")
    given = answers(apply, params, expected)
    for name in ("mean", "logvar", "decoded"):
        assert error(given[name], expected[name]) < 1e-5, name
    scaled = (expected["mean"] - config.shift_factor) * config.scaling_factor
    assert error(given["mode"], scaled) < 1e-5


def test_bfloat16_stays_near_float32_and_returns_float32(goldens):
    expected = outputs_of(goldens / "kl")
    _, params, apply = opened(goldens / "kl", "bfloat16")
    given = answers(apply, params, expected)
    for name in ("mean", "logvar", "decoded"):
        assert given[name].dtype == jnp.float32
        assert error(given[name], expected[name]) < 0.05, name


def test_tensors_survive_the_way_through_our_files_bit_for_bit(goldens, tmp_path):
    config, params, _ = opened(goldens / "kl")
    weights.save(tmp_path, params, config.names, config.to_diffusers(), dtype="float16")
    theirs = load_file(goldens / "kl" / FILE)
    ours = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert ours.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert KLConfig.from_diffusers(weights.read_config(tmp_path)) == config


def test_diffusers_opens_what_we_write_and_answers_alike(goldens, tmp_path):
    config, params, _ = opened(goldens / "kl")
    weights.save(tmp_path, params, config.names, config.to_diffusers())
    expected = outputs_of(goldens / "kl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
        model, report = diffusers.AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
        images = torch.from_numpy(np.moveaxis(expected["images"], -1, 1).copy())
        mean = model.encode(images).latent_dist.mean.detach().numpy()
    assert not any(report.values()), report
    assert error(np.moveaxis(mean, 1, -1), expected["mean"]) < 1e-6


def test_old_names_of_the_attention_load(goldens, tmp_path):
    """Stable Diffusion 1's own file calls the projections so, and holds them as convolutions."""
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, tensor in load_file(goldens / "kl" / FILE).items():
        found = [name for name in old_names if f"attentions.0.{name}." in key]
        for name in found:
            key = key.replace(name, old_names[name])
        old[key] = tensor[..., None, None] if found and tensor.ndim == 2 else tensor
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((goldens / "kl" / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, opened(tmp_path)[1], opened(goldens / "kl")[1])


def test_gradients_reach_every_parameter():
    init, apply = functional(lambda rngs: AutoencoderKL(TINY, rngs))
    shapes = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype("f"), shapes)
    images = rng.normal(size=(2, 8, 4, 3)).astype("f")

    @jax.jit
    @jax.grad
    def gradient(params):
        mean, logvar = apply(params, images, method="encode")
        decoded = apply(params, mean, method="decode")
        return jnp.mean(decoded**2) + jnp.mean(logvar**2)

    largest = {name: np.max(np.abs(leaf)) for name, leaf in flat(gradient(params)).items()}
    # A bias on all keys of an attention moves no softmax: its true gradient is zero.
    unmoved = {name for name, value in largest.items() if value < 1e-6}
    assert unmoved == {name for name in largest if name.endswith("to_k/bias")}


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_scaling_is_undone(goldens):
    _, params, apply = opened(goldens / "kl")
    z = np.random.default_rng(0).normal(size=(1, 2, 2, 4)).astype("f")
    again = apply(params, apply(params, z, method="scale"), method="unscale")
    np.testing.assert_allclose(again, z, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "config"),
    [
        (SD, KLConfig()),
        (SDXL, KLConfig(sample_size=1024, scaling_factor=0.13025)),
        (
            SD3,
            KLConfig(
                sample_size=1024,
                scaling_factor=1.5305,
                shift_factor=0.0609,
                latent_channels=16,
                use_quant_conv=False,
            ),
        ),
    ],
)
def test_configs_of_what_was_released_are_understood(values, config):
    assert KLConfig.from_diffusers(values) == config
    assert KLConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config
    assert config.downsampling == 8


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"act_fn": "mish"}, "act_fn='mish' is not supported; only act_fn='silu' is"),
        ({"use_quant_conv": False}, "use_post_quant_conv=True is not supported"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
    ],
)
def test_configs_that_ask_for_more_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        KLConfig.from_diffusers({**SD, "use_post_quant_conv": True, **values})


def test_images_that_do_not_divide_are_refused(goldens):
    _, params, apply = opened(goldens / "kl")
    with pytest.raises(ValueError, match=r"images of 8 x 7 pixels; .* takes multiples of 2"):
        apply(params, jnp.zeros((1, 8, 7, 3)), method="encode")
