"""Networks that score, from the files that their authors released: written by torch under the authors' names."""

import json
import re
import runpy
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from ldm_jax import convert
from ldm_jax.metrics.resize import as_torch_fidelity, to_images
from ldm_jax.models import weights
from ldm_jax.models.networks import described, make_network
from ldm_jax.settings.command_line import parse

torch = pytest.importorskip("torch")

GOLDENS = Path(__file__).parent / "goldens"
RELEASED = "pt_inception-2015-12-05-6726825d.pth"


def converted(to, *files, words=()):
    words = [*(f"--from={file}" for file in files), f"--to={to}", *words]
    convert.main(parse(words, add_flags=convert.add_flags, in_workdir=False))
    kind, config = described(to)
    init, apply = make_network(config)
    like = jax.eval_shape(init, jax.random.key(0))
    return config, jax.jit(apply), weights.load(to, like, kind.names(config))


def saved(path, tensors, new=True):
    """A file of NumPy arrays, as torch saves them now or did before 1.6."""
    tensors = {key: torch.from_numpy(np.array(tensor)) for key, tensor in tensors.items()}
    torch.save(tensors, path, _use_new_zipfile_serialization=new)
    return path


def outputs_of(directory):
    with np.load(directory / "outputs.npz") as file:
        return dict(file)


def error(ours, theirs):
    return np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))


@pytest.fixture(scope="module")
def inception():
    script = runpy.run_path(str(GOLDENS / "make_inception_goldens.py"))
    shapes = json.loads((GOLDENS / "inception" / "shapes.json").read_text())
    return script["draw"](shapes, seed=0)


@pytest.mark.parametrize("new", [True, False])
def test_inception_s_file_becomes_a_directory_that_answers_as_torch_fidelity_does(
    inception, tmp_path, new
):
    file = saved(tmp_path / RELEASED, inception, new)
    _, apply, params = converted(tmp_path / "to", file)
    expected = outputs_of(GOLDENS / "inception")
    given = apply(params, as_torch_fidelity(to_images(expected["pixels"])))
    for name, answer in given._asdict().items():
        assert error(answer, expected[name]) < 1e-5, name


def test_weights_are_written_in_half_precision_where_that_is_asked_for(inception, tmp_path):
    file = saved(tmp_path / RELEASED, inception)
    converted(tmp_path / "to", file, words=["--dtype=float16"])
    (written,) = (tmp_path / "to").glob("*.safetensors")
    assert {tensor.dtype.name for tensor in load_file(written).values()} == {"float16"}


def in_two_files(net, directory):
    """What the lpips package and torchvision publish, from the package's whole state."""
    whole = load_file(GOLDENS / "lpips" / net / "diffusion_pytorch_model.safetensors")
    linear = {key: tensor for key, tensor in whole.items() if re.match(r"lin\d", key)}
    trunk = {
        re.sub(r"net\.slice\d", "features", key): tensor
        for key, tensor in whole.items()
        if key.startswith("net.")
    }
    trunk["classifier.6.bias"] = np.zeros(1000, "f")
    files = directory / f"{net}.pth", directory / f"{net}-trunk.pth"
    return [saved(files[0], linear, new=False), saved(files[1], trunk)]


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_s_two_files_become_a_directory_that_answers_as_the_package_does(net, tmp_path):
    config, apply, params = converted(tmp_path / "to", *in_two_files(net, tmp_path))
    assert config.net == net
    expected = outputs_of(GOLDENS / "lpips" / net)
    given = apply(params, expected["images"], expected["others"])
    assert error(given, expected["distances"]) < 1e-5


def test_the_whole_state_of_the_lpips_package_in_one_file_is_the_same(tmp_path):
    whole = load_file(GOLDENS / "lpips" / "alex" / "diffusion_pytorch_model.safetensors")
    one = converted(tmp_path / "one", saved(tmp_path / "whole.pth", whole))[2]
    two = converted(tmp_path / "two", *in_two_files("alex", tmp_path))[2]
    jax.tree.map(np.testing.assert_array_equal, one, two)


def facebook_s(state):
    """The tensors of transformers' Dinov2Model under the names that they were published with."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "layernorm.weight": "norm.weight",
        "layernorm.bias": "norm.bias",
    }
    original = {names[key]: tensor for key, tensor in state.items() if key in names}
    for key, tensor in state.items():
        if layer := re.match(r"encoder\.layer\.(\d+)\.(.*)", key):
            number, rest = layer.groups()
            if not re.search(r"attention\.attention\.(key|value)", rest):
                name, tensor = in_a_block(rest, tensor, state, key)
                original[f"blocks.{number}.{name}"] = tensor
    return original


def in_a_block(rest, tensor, state, key):
    if "attention.attention.query" in rest:
        parts = [state[key.replace("query", name)] for name in ("query", "key", "value")]
        return rest.replace("attention.attention.query", "attn.qkv"), np.concatenate(parts)
    for theirs, name in (
        ("attention.output.dense", "attn.proj"),
        ("layer_scale1.lambda1", "ls1.gamma"),
        ("layer_scale2.lambda1", "ls2.gamma"),
        ("mlp.weights_in", "mlp.w12"),
        ("mlp.weights_out", "mlp.w3"),
    ):
        rest = rest.replace(theirs, name)
    return rest, tensor


def dinov2(directory, swiglu):
    """A file of the authors' layout, and what transformers answers with its weights; two heads of width 64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        script = runpy.run_path(str(GOLDENS / "make_dinov2_goldens.py"))
        config = transformers.Dinov2Config(
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=20,
            patch_size=4,
            use_swiglu_ffn=swiglu,
        )
        model = transformers.Dinov2Model(config).eval()
    torch.manual_seed(0)
    script["draw_weights"](model)
    model.save_pretrained(directory / "theirs")
    state = load_file(directory / "theirs" / "model.safetensors")
    saved(directory / "dinov2.pth", facebook_s(state))
    images = np.random.default_rng(0).normal(size=(2, 20, 20, 3)).astype("f")
    with torch.inference_mode():
        answer = model(torch.from_numpy(np.moveaxis(images, -1, 1).copy())).pooler_output
    return directory / "dinov2.pth", images, answer.numpy()


@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_s_file_becomes_a_directory_that_answers_as_transformers_does(tmp_path, swiglu):
    file, images, expected = dinov2(tmp_path, swiglu)
    _, apply, params = converted(tmp_path / "to", file)
    assert error(apply(params, images), expected) < 1e-5


def test_a_dinov2_with_registers_is_refused(tmp_path):
    file, *_ = dinov2(tmp_path, False)
    torch.save({**torch.load(file), "register_tokens": torch.zeros(1, 4, 128)}, file)
    with pytest.raises(ValueError, match=r"dinov2\.pth do not fit.*: they also have register_tok"):
        converted(tmp_path / "to", file)


def test_torchvision_s_inception_is_not_taken_for_that_of_fid(inception, tmp_path):
    others = {"AuxLogits.fc.bias": np.zeros(1000, "f"), "fc.weight": np.zeros((1000, 128), "f")}
    file = saved(tmp_path / "inception_v3_google-0cc3c7bd.pth", {**inception, **others})
    sentence = r"they also have AuxLogits.fc.bias, and have another shape for fc.weight \[1000, "
    with pytest.raises(ValueError, match=sentence):
        converted(tmp_path / "to", file)


def test_what_makes_no_network_is_said_and_leaves_nothing(inception, tmp_path):
    linear, trunk = in_two_files("alex", tmp_path)
    odd = saved(tmp_path / "odd.pth", {"Conv2d_1a_3x3.conv.weight": np.ones(3)})
    flat = saved(tmp_path / "flat.pth", {f"lin{i}.model.1.weight": np.ones(3) for i in range(2)})
    broken, unknown = tmp_path / "broken.pth", saved(tmp_path / "unknown.pth", {"a": np.ones(2)})
    broken.write_bytes(linear.read_bytes()[:-100])
    part = saved(tmp_path / "part.pth", {"lin0.model.1.weight": np.ones((1, 64, 1, 1))})
    names = "the names that Inception, LPIPS, Dinov2Model were released with"
    for files, sentence in (
        (
            [linear],
            r"alex\.pth holds the linear layers of LPIPS alone; give .* file of AlexNet too",
        ),
        ([trunk], rf"alex-trunk\.pth has no tensors by {names}"),
        ([unknown], rf"unknown\.pth has no tensors by {names}"),
        ([part], r"part\.pth holds LPIPS in part: it lacks 'lin1\.model\.1\.weight'"),
        ([odd], r"odd\.pth: Conv2d_1a_3x3\.conv\.weight has the shape \[3\]; it must have 4 dims"),
        ([flat], r"flat\.pth: lin0\.model\.1\.weight has the shape \[3\]; it must have 4 dims"),
        ([broken], r"broken\.pth is not a dict of tensors as torch\.save writes it"),
        ([linear, trunk, trunk], r"trunk\.pth has two tensors for features\.0\.bias"),
        ([linear, tmp_path], "--from is given 2 times, which is for files alone"),
    ):
        with pytest.raises(ValueError, match=sentence):
            converted(tmp_path / "to", *files)
    with pytest.raises(ValueError, match=r"--weights=raw is for runs; .*alex\.pth is none"):
        converted(tmp_path / "to", linear, trunk, words=["--weights=raw"])
    assert not any(path.is_dir() for path in tmp_path.iterdir())
