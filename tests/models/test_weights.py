import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from ldm_jax.models import weights
from ldm_jax.models.names import Names, entries

CONFIG = {"_class_name": "AutoencoderKL"}
FILE = "diffusion_pytorch_model.safetensors"
HALF = "diffusion_pytorch_model.fp16.safetensors"
NAMES = Names(
    renames=(("out", "out.0"),),
    pointwise=("point",),
    legacy=((r"^old\.", "linear."),),
    unused=(r"\.constant$",),
)


def some_params():
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (3, 3, 2, 5), "bias": (5,)},
        "linear": {"kernel": (2, 4)},
        "mid": {"layers": {"block": {"out": {"kernel": (3, 2, 4)}, "norm": {"scale": (3, 2)}}}},
        "point": {"kernel": (2, 4)},
        "temperature": (),
        "words": {"embedding": (7, 2)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


@pytest.fixture
def params():
    return some_params()


@pytest.fixture
def directory(params, tmp_path):
    weights.save(tmp_path, params, NAMES, CONFIG)
    return tmp_path


def rewrite(directory, change, file=FILE):
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file)


def assert_same(given, expected):
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, given, expected)


def test_tensors_have_the_names_and_layouts_of_torch(params, directory):
    tensors = load_file(directory / FILE)
    flat = jax.tree.map(np.asarray, params)
    stack = flat["mid"]["layers"]["block"]
    expected = {
        "conv.weight": flat["conv"]["kernel"].transpose(3, 2, 0, 1),
        "conv.bias": flat["conv"]["bias"],
        "linear.weight": flat["linear"]["kernel"].T,
        "point.weight": flat["point"]["kernel"].T[:, :, None, None],
        "temperature": flat["temperature"],
        "words.weight": flat["words"]["embedding"],
        **{f"mid.layers.{i}.out.0.weight": stack["out"]["kernel"][i].T for i in range(3)},
        **{f"mid.layers.{i}.norm.weight": stack["norm"]["scale"][i] for i in range(3)},
    }
    assert tensors.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, tensors, expected)


def test_parameters_survive_a_save_and_a_load(params, directory):
    assert_same(weights.load(directory, jax.eval_shape(lambda: params), NAMES), params)
    assert weights.read_config(directory) == CONFIG


def test_transformers_configs_give_transformers_file_name(params, tmp_path):
    weights.save(tmp_path, params, NAMES, {"model_type": "clip"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(weights.load(tmp_path, params, NAMES), params)


def test_shards_are_read_through_their_index(params, directory):
    tensors = sorted(load_file(directory / FILE).items())
    (directory / FILE).unlink()
    index = {}
    for i, part in enumerate((tensors[:4], tensors[4:])):
        save_file(dict(part), directory / f"shard-{i}.safetensors")
        index |= {key: f"shard-{i}.safetensors" for key, _ in part}
    (directory / f"{FILE}.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(weights.load(directory, params, NAMES), params)
    (directory / "shard-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lists shards that are not there: shard-1"):
        weights.load(directory, params, NAMES)


def test_full_precision_is_preferred_and_half_is_enough(params, directory):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(jnp.float32), params)
    weights.save(directory / "half", params, NAMES, CONFIG, dtype="float16")
    (directory / "half" / FILE).rename(directory / HALF)
    assert_same(weights.load(directory, params, NAMES), params)
    (directory / FILE).unlink()
    assert_same(weights.load(directory, params, NAMES), half)


def test_bfloat16_files_are_read(params, directory):
    def change(tensors):
        for key, tensor in tensors.items():
            tensors[key] = tensor.astype(ml_dtypes.bfloat16)

    rewrite(directory, change)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert_same(weights.load(directory, params, NAMES), expected)


def test_keys_of_old_files_are_understood_and_constants_skipped(params, directory):
    def change(tensors):
        tensors["old.weight"] = tensors.pop("linear.weight")
        tensors["point.weight"] = tensors["point.weight"][:, :, 0, 0].copy()
        tensors["some.constant"] = np.zeros(3)

    rewrite(directory, change)
    assert_same(weights.load(directory, params, NAMES), params)


def test_parameters_are_placed_as_asked(params, directory):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    places = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params)
    loaded = weights.load(directory, params, NAMES, shardings=places)
    assert_same(loaded, params)
    for leaf, place in zip(jax.tree.leaves(loaded), jax.tree.leaves(places), strict=True):
        assert leaf.sharding == place


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("linear.weight"), "they lack linear.weight"),
        (lambda t: t.update(more=np.zeros(1)), "they also have more"),
        (
            lambda t: t.update({"conv.bias": np.zeros(6)}),
            r"another shape for conv.bias \[6\], not \[5\]",
        ),
        (
            lambda t: [t.pop(key) for key in list(t) if "mid" in key],
            r"they lack mid\.layers\.0\.norm\.weight, .* and 1 more",
        ),
        (
            lambda t: t.update({"old.weight": t["linear.weight"].copy()}),
            "two tensors for linear.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(params, directory, change, sentence):
    rewrite(directory, change)
    with pytest.raises(ValueError, match=sentence):
        weights.load(directory, params, NAMES)


def test_directories_without_weights_say_what_was_looked_for_and_what_is_there(params, directory):
    (directory / FILE).rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=f"looked for {FILE}.*; there is.*model.bin"):
        weights.load(directory, params, NAMES)
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        weights.load(directory / "none", params, NAMES)


def test_broken_files_are_refused(params, directory):
    (directory / FILE).write_bytes((directory / FILE).read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{FILE} is not a readable safetensors file"):
        weights.load(directory, params, NAMES)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        weights.read_config(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; there is"):
        weights.read_config(directory)


def test_a_save_that_fails_leaves_the_file_that_was_there(params, directory, monkeypatch):
    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        weights.save(directory, jax.tree.map(jnp.zeros_like, params), NAMES, CONFIG)
    assert_same(weights.load(directory, params, NAMES), params)


def test_only_dtypes_that_diffusers_reads_without_being_told_are_written(params, tmp_path):
    with pytest.raises(ValueError, match="float32 or float16, not as 'int8'"):
        weights.save(tmp_path, params, NAMES, CONFIG, dtype="int8")


def test_two_parameters_cannot_have_one_name():
    params = {"a": {"kernel": np.zeros((1, 1))}, "b": {"kernel": np.zeros((1, 1))}}
    with pytest.raises(ValueError, match=r"a/kernel and b/kernel are both called b\.weight"):
        entries(params, Names(renames=(("a", "b"),)))


def test_fingerprints_tell_parameters_apart_and_nothing_else(params):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    elsewhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    backwards = dict(reversed(params.items()))
    same = {weights.fingerprint(tree) for tree in (params, elsewhere, backwards)}
    assert len(same) == 1
    renamed = {**params, "heat": params["temperature"]}
    del renamed["temperature"]
    nudged = {**params, "temperature": params["temperature"] * (1 + 1e-6)}
    reshaped = {**params, "temperature": params["temperature"][None]}
    others = {weights.fingerprint(tree) for tree in (renamed, nudged, reshaped)}
    assert len(same | others) == 4
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in same | others)
