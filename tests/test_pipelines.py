"""Pretrained directories of every kind, through a run and out again, against diffusers' own pipelines.

The autoencoder and CLIP's tokenizer are the embedded ones; text encoders are drawn at random.
"""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.numpy import load_file

from ldm_jax import convert, encode, sample, train
from ldm_jax.diffusion import Leading, initial_noise
from ldm_jax.metrics.resize import rounded
from ldm_jax.models import weights
from ldm_jax.models.clip import CLIPTextConfig
from ldm_jax.models.networks import KINDS, make_network
from ldm_jax.models.pixart_config import PixArtConfig
from ldm_jax.models.t5 import T5Config
from ldm_jax.models.uvit_config import UViTConfig
from ldm_jax.parallel import MeshConfig
from ldm_jax.planning import programs
from ldm_jax.runs.config import RunConfig
from ldm_jax.runs.convert import INDEX, model_index
from ldm_jax.runs.encode import encode as encode_run
from ldm_jax.runs.initial import pipeline_config
from ldm_jax.runs.pretrained import pretrained_directory
from ldm_jax.runs.run import Run
from ldm_jax.runs.sample import draw
from ldm_jax.settings.command_line import UsageError, load_config, parse
from ldm_jax.settings.schema import from_config_dict

T5_TOKENIZER = Path(__file__).parent / "goldens" / "t5_tokenizer"
ASSETS = pretrained_directory(tiny.TINY)
PROMPT = "a red circle"
CLIP = CLIPTextConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=662,
    max_position_embeddings=64,
    eos_token_id=661,
    bos_token_id=660,
    pad_token_id=661,
)
TEXT = {
    "sd2.1": [CLIP],
    "sdxl": [CLIP, dataclasses.replace(CLIP, hidden_act="gelu", projection_dim=24)],
    "pixart": [T5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)],
}
BACKBONES = {
    "sd2.1": dataclasses.replace(tiny.TINY.backbone, text_width=32),
    "sdxl": dataclasses.replace(tiny.TINY.backbone, text_width=64, pooled_width=24, size_width=8),
    "pixart": PixArtConfig(
        width=24, depth=2, num_heads=2, text_width=32, sample_size=128, size_conditioning=True
    ),
}
PIPELINES = {
    "sd2.1": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "pixart": "PixArtAlphaPipeline",
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Where directories stand that tests only read."""
    return tmp_path_factory.mktemp("shelf")


def save_text_encoder(directory, config, number):
    (kind,) = {kind for kind in KINDS.values() if kind.config is type(config)}
    params = make_network(config).init(jax.random.key(number))
    suffix = "_2" if number else ""
    path = directory / f"text_encoder{suffix}"
    weights.save(path, params, kind.names(config), kind.write(config))
    tokenizer = T5_TOKENIZER if isinstance(config, T5Config) else ASSETS / "tokenizer"
    shutil.copytree(tokenizer, directory / f"tokenizer{suffix}")


def config_of(name, directory, **changes):
    """A run with a directory of this kind beside it."""
    if not directory.exists():
        shutil.copytree(ASSETS / "vae", directory / "vae")
        for number, config in enumerate(TEXT[name]):
            save_text_encoder(directory, config, number)
    train = dataclasses.replace(tiny.TINY.train, examples=8, save_every=8, log_every=8, ema=0.0)
    fields = {
        "pretrained": str(directory),
        "backbone": BACKBONES[name],
        "data": dataclasses.replace(tiny.TINY.data, source="scenes:simple?count=8"),
        "train": train,
        "optimizer": dataclasses.replace(tiny.TINY.optimizer, learning_rate=0.1),
        "eval": dataclasses.replace(tiny.TINY.eval, prompts="captions:8", validation=0),
    }
    return dataclasses.replace(tiny.TINY, **fields | changes)


def converted(source, to, *words):
    words = [f"--from={source}", f"--to={to}", *words]
    convert.main(parse(words, add_flags=convert.add_flags, in_workdir=False))


def drawn_by_diffusers(pipeline, config, noise):
    """Their image, rounded, of the prompt from this noise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
        theirs = getattr(diffusers, PIPELINES[pipeline.name]).from_pretrained(pipeline)
        theirs.set_progress_bar_config(disable=True)
        extra = {"use_resolution_binning": False} if pipeline.name == "pixart" else {}
        (image,) = theirs(
            PROMPT,
            height=64,
            width=64,
            num_inference_steps=config.sampling.steps,
            guidance_scale=config.sampling.guidance,
            latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()),
            output_type="np",
            **extra,
        ).images
    return np.round(image * 255).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "pixart"])  # SD's images are compared below
def test_a_run_with_such_a_directory_becomes_a_pipeline_that_draws_the_same_image(tmp_path, name):
    config, workdir = config_of(name, tmp_path / "pretrained"), tmp_path / "run"
    tiny.run(encode, workdir, tiny.given(tmp_path, config))
    tiny.run(train, workdir)
    tiny.run(sample, workdir, f"--prompt={PROMPT}", add_flags=sample.add_flags)
    with Image.open(workdir / "images" / "00000-00.png") as image:
        ours = np.asarray(image).astype(int)
    converted(workdir, tmp_path / name)
    key = jax.random.fold_in(jax.random.fold_in(Run(config).key("sample"), 0), 0)
    noise = np.asarray(initial_noise(key[None], (8, 8, 4)))
    theirs = drawn_by_diffusers(tmp_path / name, config, noise)
    assert np.std(ours) > 5
    assert np.abs(ours - theirs).max() <= 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tensors_of_a_pipeline_come_out_bit_for_bit(tmp_path, dtype):
    source, first = tmp_path / "sdxl", tmp_path / "first"
    config_of("sdxl", source)
    (source / INDEX).write_text("{}")
    converted(source, first, "--max-shard-size=2e4")
    assert all(
        len(list((first / part).glob("*.safetensors"))) > 1 for part in ("vae", "text_encoder")
    )
    converted(first, tmp_path / "second", f"--dtype={dtype}")
    for path in source.rglob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "second" / path.relative_to(source))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert after[key].dtype == dtype
            np.testing.assert_array_equal(tensor.astype(dtype), after[key])
    for path in ("tokenizer/merges.txt", "tokenizer_2/vocab.json", INDEX):
        assert (tmp_path / "second" / path).read_bytes() == (source / path).read_bytes()


# What diffusers and transformers need, and the networks here do not; with values that are not their defaults.
SETTINGS = {
    "sd1.5": {"unet": {"attention_head_dim": 4, "class_embeddings_concat": True}, "vae": {}},
    "sd2.1": {"unet": {"upcast_attention": True, "addition_embed_type_num_heads": 32}, "vae": {}},
    "sdxl": {"unet": {"upcast_attention": None}, "vae": {"force_upcast": False}},
    "pixart": {"transformer": {"num_embeds_ada_norm": 500, "norm_num_groups": 16}, "vae": {}},
}
NEW = {"sample_size": 48, "_diffusers_version": "0.24.0", "_name_or_path": "somewhere"}


def pipeline_with_settings(name, directory):
    """Networks of one released pipeline, small, whose config.json say more than the networks here need."""
    kind = "sd2.1" if name == "sd1.5" else name
    config_of(kind, directory)
    (directory / INDEX).write_text("{}")
    part = "transformer" if name == "pixart" else "unet"
    backbone = BACKBONES[kind]
    if name == "sd1.5":
        backbone = dataclasses.replace(backbone, num_heads=4, use_linear_projection=False)
    params = make_network(backbone).init(jax.random.key(0))
    weights.save(directory / part, params, backbone.names, backbone.to_diffusers())
    for changed, settings in SETTINGS[name].items():
        rewrite(directory / changed, {**NEW, **settings})
    rewrite(
        directory / "text_encoder",
        {"torch_dtype": "float32", "dtype": "float32", "attention_dropout": 0.25},
    )


def rewrite(directory, settings):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_of_a_pipeline_survives_in_half_precision(tmp_path, name):
    pipeline_with_settings(name, tmp_path / "from")
    converted(tmp_path / "from", tmp_path / "to", "--dtype=float16")
    for part in (*SETTINGS[name], "text_encoder"):
        before, after = (weights.read_config(tmp_path / to / part) for to in ("from", "to"))
        stored = dict.fromkeys(weights.STORED, "float16") if part == "text_encoder" else {}
        assert after == {**before, **stored}
    for part in SETTINGS[name]:
        before, after = (known_to_diffusers(tmp_path / to / part) for to in ("from", "to"))
        assert before == after and before["sample_size"] == 48


def known_to_diffusers(directory):
    """The settings that their class has after `from_config`, but for the version that wrote them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers")
        kind = getattr(diffusers, weights.read_config(directory)["_class_name"])
        model = kind.from_config(kind.load_config(directory))
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


@pytest.mark.parametrize("content", ["5", "null", "[]"])
def test_an_index_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=rf"{INDEX} holds .*; it must be an object"):
        converted(tmp_path, tmp_path / "to")


def test_a_clip_whose_tokenizer_says_no_length_has_that_of_its_text_tower(tmp_path):
    config = config_of("sd2.1", tmp_path / "pretrained")
    path = tmp_path / "pretrained" / "tokenizer" / "tokenizer_config.json"
    values = json.loads(path.read_text())
    del values["model_max_length"]
    path.write_text(json.dumps(values))
    text = Run(config).frozen.text
    assert text.tokenizers[0].max_length == CLIP.max_position_embeddings


def test_what_cannot_be_converted_is_said_and_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="is neither a run"):
        converted(tmp_path / "nothing", tmp_path / "to")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="--weights=raw is for runs"):
        converted(tmp_path, tmp_path / "to", "--weights=raw")
    for size in ("5GB", "0", "nan", "inf"):
        with pytest.raises(UsageError, match=f"'{size}' is no number of bytes from 1 on"):
            converted(tmp_path, tmp_path / "to", f"--max-shard-size={size}")
    (tmp_path / "to").mkdir()
    with pytest.raises(ValueError, match="exists; give a directory that there is not yet"):
        converted(tmp_path, tmp_path / "to")


def test_a_pipeline_that_diffusers_does_not_have_is_said():
    config = dataclasses.replace(tiny.TINY, backbone=UViTConfig(text_width=64))
    text = Run(config).frozen.text
    with pytest.raises(ValueError, match="no pipeline of a UViTConfig and CLIPTextConfig"):
        model_index(config.backbone, text)


def loaded(name, directory, precision):
    return Run(config_of(name, directory, text_precision=precision)).frozen


def error(given, expected):
    return np.max(np.abs(given.astype("float32") - expected)) / np.max(np.abs(expected))


@pytest.mark.parametrize("name", TEXT)
def test_text_in_bfloat16_is_near_that_in_float32_and_told_apart(shelf, name):
    """Also from the same parameters, which files that hold bfloat16 give."""
    full, half = (loaded(name, shelf / name, precision) for precision in ("float32", "bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.text_params)} == {"bfloat16"}
    rounded = jax.tree.map(lambda leaf: leaf.astype("float32"), half.text_params)
    prints = map(weights.fingerprint, (full.text_params, half.text_params, rounded))
    assert len(set(prints)) == 3
    expected, given = (
        jax.jit(pretrained.encode)(pretrained.params, pretrained.text([PROMPT, ""]))
        for pretrained in (full, half)
    )
    for embedded in ("tokens", "pooled"):
        if getattr(expected, embedded) is not None:
            assert 0 < error(getattr(given, embedded), getattr(expected, embedded)) < 0.03
    np.testing.assert_array_equal(given.mask, expected.mask)
    np.testing.assert_array_equal(given.sizes, expected.sizes)


@pytest.mark.parametrize("name", TEXT)
def test_a_backbone_makes_its_own_precision_of_the_texts(shelf, name):
    config = config_of(name, shelf / name)
    contexts = {"float32": [], "bfloat16": []}
    for text_precision in contexts:
        for precision, prepared in contexts.items():
            train = dataclasses.replace(config.train, precision=precision)
            run = Run(dataclasses.replace(config, train=train, text_precision=text_precision))
            frozen = run.frozen
            cond = jax.eval_shape(frozen.encode, frozen.params, frozen.text([PROMPT]))
            params = jax.eval_shape(run.network.init, jax.random.key(0))
            prepared.append(jax.eval_shape(run.prepare, params, cond))
    assert all(first == second for first, second in contexts.values())
    first, second = (jax.tree.leaves(each[0])[0] for each in contexts.values())
    assert (first.dtype.name, second.dtype.name) == tuple(contexts)


def test_a_precision_that_there_is_not_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=r"text_precision.*float16.*float32, bfloat16"):
        words = [f"--workdir={tmp_path}", tiny.given(tmp_path), "--config.text_precision=float16"]
        parse(words, RunConfig)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("sdxl", {"text_width": 32}, "text_width is 32, and the pretrained models have 64"),
        ("sdxl", {"text_width": 32}, r"give --config\.backbone\.unet\.text_width=64, or --config"),
        (
            "sdxl",
            {"out_channels": 2, "text_width": 8},
            r"give --config\.backbone\.unet\.text_width=64 --config\.backbone\.unet\.out_channels=4,",
        ),
        ("pixart", {"text_width": 8}, r"give --config\.backbone\.pixart\.text_width=32, or"),
        ("sdxl", {"pooled_width": 8}, "pooled_width is 8, and the pretrained models have 24"),
        ("pixart", {"in_channels": 2}, "in_channels is 2, and the pretrained models have 4"),
    ],
)
def test_a_backbone_that_does_not_fit_the_directory_is_refused(shelf, name, changes, sentence):
    backbone = dataclasses.replace(BACKBONES[name], **changes)
    config = config_of(name, shelf / name, backbone=backbone)
    with pytest.raises(ValueError, match=sentence):
        _ = Run(config).network


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", [*BACKBONES, "uvit"])
def test_what_is_planned_is_what_runs(shelf, tmp_path, name, stored):
    """Shapes and dtypes of a planned batch are those that the loader reads, and the step takes both."""
    kind = "sd2.1" if name == "uvit" else name
    backbone = UViTConfig(text_width=32, width=24, depth=2, num_heads=2, sample_size=8)
    changes = {"backbone": backbone} if name == "uvit" else {}
    config = config_of(kind, shelf / kind, **changes)
    data = dataclasses.replace(config.data, text_embeddings=stored, source="scenes:simple?count=8")
    run = Run(dataclasses.replace(config, data=data), tmp_path)
    encode_run(run)
    loader = run.loader()
    read, planned = next(loader), programs.batch(programs.Planned(run.config))
    loader.close()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), read) == jax.tree.map(
        lambda x: (x.shape, x.dtype), planned
    )
    state = run.training.abstract
    _, scalars = jax.eval_shape(run.training.step, state, run.frozen.params, read)
    assert scalars["loss"].shape == ()


def written_by_diffusers(directory):
    """A pipeline of Stable Diffusion 1.5's structure at a small width, its UNet and scheduler diffusers' own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        scheduler = diffusers.DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            set_alpha_to_one=False,
            clip_sample=False,
        )
        config_of("sd2.1", directory)
        unet.save_pretrained(directory / "unet")
        scheduler.save_pretrained(directory / "scheduler")
    index = {**model_index(TINY_UNET, Run(config_of("sd2.1", directory)).frozen.text)}
    (directory / INDEX).write_text(json.dumps(index))
    return directory


TINY_UNET = BACKBONES["sd2.1"]


def test_a_pipeline_that_diffusers_wrote_gives_the_images_that_diffusers_gives(tmp_path):
    """As the beginning of a run on another mesh, before its first step."""
    directory = written_by_diffusers(tmp_path / "sd2.1")
    config = pipeline_config(directory, tiny.TINY)
    assert (config.prediction, config.sampling.spacing, config.data.size) == ("eps", Leading(), 64)
    run = Run(dataclasses.replace(config, mesh=MeshConfig(fsdp=4)), tmp_path / "run")
    params = run.state().params
    assert len(jax.tree.leaves(params)[0].sharding.device_set) == 8
    ours = draw(run, run.generate(finish=rounded), params, [PROMPT], 1)[0].astype(int)
    key = jax.random.fold_in(jax.random.fold_in(run.key("sample"), 0), 0)
    noise = np.asarray(initial_noise(key[None], (8, 8, 4)))
    theirs = drawn_by_diffusers(directory, config, noise)
    assert np.std(ours) > 5
    assert np.abs(ours - theirs).max() <= 2
    released = from_config_dict(load_config(f"configs/released.py:{directory}"), RunConfig)
    assert released.initial == released.pretrained == str(directory)
    assert released.backbone == config.backbone
    words = [f"--from={directory}", f"--prompt={PROMPT}", f"--output={tmp_path / 'drawn'}"]
    words += [f"--config.sampling.steps={run.config.sampling.steps}"]
    words += [f"--config.sampling.guidance={run.config.sampling.guidance}"]
    options = {"add_flags": sample.add_flags, "config_of": sample.config_of}
    sample.main(parse(words, RunConfig, **options))
    with Image.open(tmp_path / "drawn" / "00000-00.png") as image:
        assert np.abs(np.asarray(image).astype(int) - theirs).max() <= 2
    with pytest.raises(UsageError, match="--workdir=DIRECTORY is missing"):
        parse(words[1:2], RunConfig, **options)
    with pytest.raises(
        ValueError, match=r"prediction is v, and .* predict eps: give --config.pred"
    ):
        Run(dataclasses.replace(run.config, prediction="v")).initial()
