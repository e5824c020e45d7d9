import contextlib
import importlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tracemalloc
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from ldm_jax.models import weights
from ldm_jax.models.names import Names, entries
from ldm_jax.models.networks import described, make_network

CONFIG = {"_class_name": "AutoencoderKL"}
FILE = "diffusion_pytorch_model.safetensors"
HALF = "diffusion_pytorch_model.fp16.safetensors"
INDEX = f"{FILE}.index.json"
TOTAL = 624  # bytes of `some_params` in float32
WHOLE = 10**9  # bytes of a file that holds all of it
MEGABYTE = 2**20
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


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def tensors_of(directory):
    """Of all files, whatever the index says."""
    files = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    return dict(itertools.chain.from_iterable(file.items() for file in files))


def data_mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


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


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("limit", [1, 100, 250])
def test_what_is_larger_than_a_file_may_be_is_divided(params, directory, tmp_path, dtype, limit):
    new = tmp_path / "new"
    weights.save(new, params, NAMES, CONFIG, dtype=dtype, max_shard_size=limit)
    index = json.loads((new / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    stem, count = FILE.removesuffix(".safetensors"), len(files)
    assert files == [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert content(new).keys() == {*files, INDEX, "config.json"}
    parts = {file: load_file(new / file) for file in files}
    assert index["weight_map"] == {key: file for file in files for key in parts[file]}
    sizes = [sum(tensor.nbytes for tensor in part.values()) for part in parts.values()]
    assert index["metadata"] == {"total_size": sum(sizes)}
    assert all(
        size <= limit or len(parts[file]) == 1 for file, size in zip(files, sizes, strict=True)
    )
    expected = {key: tensor.astype(dtype) for key, tensor in load_file(directory / FILE).items()}
    assert_same(tensors_of(new), expected)


@pytest.mark.parametrize(("dtype", "total"), [("float32", TOTAL), ("float16", TOTAL // 2)])
def test_what_is_not_larger_is_one_file(params, tmp_path, dtype, total):
    for limit, files in ((total, 1), (WHOLE, 1), (total - 1, 2)):
        directory = tmp_path / str(limit)
        weights.save(directory, params, NAMES, CONFIG, dtype=dtype, max_shard_size=limit)
        assert len(list(directory.glob("*.safetensors"))) == files
        assert (directory / INDEX).exists() == (files > 1)


@pytest.mark.parametrize("size", [0, -1])
def test_files_of_no_size_are_refused(params, tmp_path, size):
    with pytest.raises(ValueError, match=f"max_shard_size is {size} bytes; it is at least 1"):
        weights.save(tmp_path / "new", params, NAMES, CONFIG, max_shard_size=size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", [CONFIG, {"model_type": "clip"}])
@pytest.mark.parametrize("after", [WHOLE, 300, 1])
@pytest.mark.parametrize("before", [WHOLE, 300, 1])
def test_nothing_is_left_of_the_weights_that_were_there(params, tmp_path, before, after, config):
    weights.save(tmp_path / "old", params, NAMES, config, max_shard_size=before)
    (tmp_path / "old" / "README.md").write_text("kept")
    stale = (
        HALF,
        "model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00001-of-00007.fp16.safetensors",
        "model.safetensors.index.fp16.json",
    )
    for name in stale:
        (tmp_path / "old" / name).write_text("of something else")
    new = jax.tree.map(lambda leaf: leaf + 1, params)
    for directory in (tmp_path / "old", tmp_path / "new"):
        weights.save(directory, new, NAMES, CONFIG, max_shard_size=after)
    expected = content(tmp_path / "new")
    assert content(tmp_path / "old") == {**expected, "README.md": b"kept"}


@pytest.mark.parametrize(
    ("before", "after"), [(WHOLE, WHOLE), (WHOLE, 300), (300, WHOLE), (1, 1), (1, 300)]
)
def test_at_no_moment_does_a_reader_find_a_mixture(params, tmp_path, monkeypatch, before, after):
    """Diffusers looks for an index first, transformers and `load` for a single file."""
    old, new = params, jax.tree.map(lambda leaf: leaf + 1, params)
    weights.save(tmp_path / "old", old, NAMES, CONFIG, max_shard_size=before)
    outcomes, dies = [], True
    while dies:
        directory = shutil.copytree(tmp_path / "old", tmp_path / str(len(outcomes)))
        with dying_at(len(outcomes), monkeypatch) as death:
            weights.save(directory, new, NAMES, CONFIG, max_shard_size=after)
        dies = death.came
        outcomes.append([reader(directory, old, new) for reader in (single_first, index_first)])
    assert outcomes[0] == ["old", "old"] and outcomes[-1] == ["new", "new"]
    both_divided = max(before, after) < TOTAL
    expected = {"old", "new", "nothing"} if both_divided else {"old", "new"}
    assert set(itertools.chain(*outcomes)) == expected


@contextlib.contextmanager
def dying_at(moment, monkeypatch):
    """The process dies, as it were, instead of its so-manieth renaming or removal of a file."""
    death, left = types.SimpleNamespace(came=False), itertools.count(moment, -1)

    def counted(step):
        def call(self, *arguments, **options):
            if next(left) == 0:
                death.came = True
                raise KeyboardInterrupt
            return step(self, *arguments, **options)

        return call

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        for step in ("replace", "unlink"):
            patch.setattr(Path, step, counted(getattr(Path, step)))
        yield death


def single_first(directory, old, new):
    try:
        found = weights.load(directory, old, NAMES)
    except FileNotFoundError:
        return "nothing"
    is_old, is_new = (
        all(jax.tree.leaves(jax.tree.map(np.array_equal, found, tree))) for tree in (old, new)
    )
    assert is_old or is_new
    return "old" if is_old else "new"


def index_first(directory, old, new):
    if (directory / INDEX).exists():
        (directory / FILE).unlink(missing_ok=True)
    return single_first(directory, old, new)


def test_parameters_that_devices_divide_are_written_whole_and_leave_nothing_on_the_host(tmp_path):
    """A host holds the tensors of one file, and a parameter that it is about to convert."""
    rng, place = np.random.default_rng(0), NamedSharding(data_mesh(), PartitionSpec(None, "data"))
    arrays = {str(i): {"kernel": rng.normal(size=(256, 1024)).astype("f")} for i in range(16)}
    params = jax.block_until_ready(jax.device_put(arrays, place))
    tracemalloc.start()
    weights.save(tmp_path, params, Names(), CONFIG, max_shard_size=4 * MEGABYTE)
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert left < 2 * MEGABYTE and 4 * MEGABYTE < peak < 7 * MEGABYTE  # of 16
    assert_same(tensors_of(tmp_path), {f"{i}.weight": arrays[i]["kernel"].T for i in arrays})


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_copying_a_directory_holds_a_file_at_a_time(tmp_path, stored):
    rng = np.random.default_rng(0)
    params = {"a": {"layers": {"block": {"kernel": rng.normal(size=(16, 512, 512)).astype("f")}}}}
    params |= {str(i): {"kernel": rng.normal(size=(512, 512)).astype("f")} for i in range(16)}
    first, second = tmp_path / "first", tmp_path / "second"
    weights.save(first, params, Names(), CONFIG, dtype=stored)
    like = jax.eval_shape(lambda: params)
    tracemalloc.start()
    unread = weights.lazy(first, like, Names())
    weights.save(second, unread, Names(), CONFIG, max_shard_size=4 * MEGABYTE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (16 + 4 + 2.5) * MEGABYTE  # the stacked parameter, the file, and a tensor
    assert len(list(second.glob("*.safetensors"))) == 8
    assert_same(weights.load(second, like, Names()), weights.load(first, like, Names()))


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


@pytest.mark.parametrize(
    ("name", "dtype"), [("I8", "int8"), ("F8_E4M3", ml_dtypes.float8_e4m3fn), ("C64", "complex64")]
)
def test_quantised_files_are_refused_by_tensor(params, directory, name, dtype):
    def change(tensors):
        tensors["conv.bias"] = np.zeros(5, dtype)

    rewrite(directory, change)
    with pytest.raises(ValueError, match=rf"{FILE}: conv\.bias is stored as {name}; only F64, F32"):
        weights.load(directory, params, NAMES)


@pytest.mark.parametrize("length", [0, 2, 2**31, 2**62])
def test_a_header_of_another_length_is_refused(params, directory, length):
    whole = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(length.to_bytes(8, "little") + whole[8:])
    with pytest.raises(ValueError, match=f"{FILE} is not a readable safetensors file"):
        weights.load(directory, params, NAMES)


def test_transformers_configs_say_the_dtype_of_what_is_written(params, tmp_path):
    config = {"model_type": "clip", "dtype": "float32", "torch_dtype": "bfloat16"}
    weights.save(tmp_path, params, NAMES, config, dtype="float16")
    written = weights.read_config(tmp_path)
    assert written == {"model_type": "clip", "dtype": "float16", "torch_dtype": "float16"}
    weights.save(tmp_path, params, NAMES, {**CONFIG, "dtype": "float32"}, dtype="float16")
    assert weights.read_config(tmp_path)["dtype"] == "float32"  # that of the computation


def test_keys_of_old_files_are_understood_and_constants_skipped(params, directory):
    def change(tensors):
        tensors["old.weight"] = tensors.pop("linear.weight")
        tensors["point.weight"] = tensors["point.weight"][:, :, 0, 0].copy()
        tensors["some.constant"] = np.zeros(3)

    rewrite(directory, change)
    assert_same(weights.load(directory, params, NAMES), params)


def test_parameters_are_placed_as_asked(params, directory):
    places = jax.tree.map(lambda _: NamedSharding(data_mesh(), PartitionSpec()), params)
    loaded = weights.load(directory, params, NAMES, shardings=places)
    assert_same(loaded, params)
    for leaf, place in zip(jax.tree.leaves(loaded), jax.tree.leaves(places), strict=True):
        assert leaf.sharding == place


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_device_gets_its_part_and_the_host_holds_one_parameter(tmp_path, dtype):
    rng, place = np.random.default_rng(0), NamedSharding(data_mesh(), PartitionSpec(None, "data"))
    params = {str(i): {"kernel": rng.normal(size=(512, 512)).astype("f")} for i in range(16)}
    weights.save(tmp_path, params, Names(), CONFIG, max_shard_size=8 * MEGABYTE)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
    places = jax.tree.map(lambda _: place, params)
    tracemalloc.start()
    loaded = weights.load(tmp_path, like, Names(), shardings=places)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Of 16: the parameter, the tensor that it is read from, and parts that JAX has not let go yet.
    assert peak < 4 * MEGABYTE
    for name, leaf in loaded.items():
        expected, leaf = params[name]["kernel"].astype(dtype), leaf["kernel"]
        assert (leaf.sharding, leaf.dtype) == (place, dtype)
        for i, shard in enumerate(leaf.addressable_shards):
            np.testing.assert_array_equal(shard.data, expected[:, 64 * i : 64 * (i + 1)])


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


@pytest.mark.parametrize("after", [WHOLE, 300])
@pytest.mark.parametrize("before", [WHOLE, 300])
def test_a_save_that_fails_leaves_the_files_that_were_there(
    params, tmp_path, monkeypatch, before, after
):
    weights.save(tmp_path, params, NAMES, CONFIG, max_shard_size=before)
    expected = content(tmp_path)

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half of it")
        if path.name == FILE or "00002" in path.name:
            raise OSError("no space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    zeros = jax.tree.map(jnp.zeros_like, params)
    with pytest.raises(OSError, match="no space"):
        weights.save(tmp_path, zeros, NAMES, {**CONFIG, "new": 1}, max_shard_size=after)
    assert content(tmp_path) == expected


def test_only_dtypes_that_diffusers_reads_without_being_told_are_written(params, tmp_path):
    with pytest.raises(ValueError, match="float32 or float16, not as 'int8'"):
        weights.save(tmp_path, params, NAMES, CONFIG, dtype="int8")


def test_two_parameters_cannot_have_one_name():
    params = {"a": {"kernel": np.zeros((1, 1))}, "b": {"kernel": np.zeros((1, 1))}}
    with pytest.raises(ValueError, match=r"a/kernel and b/kernel are both called b\.weight"):
        entries(params, Names(renames=(("a", "b"),)))


def test_fingerprints_tell_parameters_apart_and_nothing_else(params):
    elsewhere = jax.device_put(params, NamedSharding(data_mesh(), PartitionSpec()))
    backwards = dict(reversed(params.items()))
    same = {weights.fingerprint(tree) for tree in (params, elsewhere, backwards)}
    assert len(same) == 1
    renamed = {**params, "heat": params["temperature"]}
    del renamed["temperature"]
    nudged = {**params, "temperature": params["temperature"] * (1 + 1e-6)}
    reshaped = {**params, "temperature": params["temperature"][None]}
    others = {weights.fingerprint(tree) for tree in (renamed, nudged, reshaped)}
    assert len(same | others) == 4
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    same_values = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    others |= {weights.fingerprint(tree) for tree in (half, same_values)}
    assert len(same | others) == 6
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in same | others)


def opened(directory):
    """Kind, config, and parameters of what a directory holds."""
    kind, config = described(directory)
    like = jax.eval_shape(make_network(config).init, jax.random.key(0))
    return kind, config, weights.load(directory, like, kind.names(config))


def opened_by_them(library, directory, **options):
    """What the library of the class that the directory names makes of it."""
    pytest.importorskip("torch")
    values = weights.read_config(directory)
    name = values.get("_class_name") or values["architectures"][0]
    if any("fp16" in path.name for path in directory.iterdir()):
        options["variant"] = "fp16"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(library)
        kind = getattr(importlib.import_module(library), name)
        return kind.from_pretrained(directory, **options)


NETWORKS = [("diffusers", "kl"), ("transformers", "clip_text"), ("transformers", "t5")]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("library", "name"), NETWORKS)
def test_diffusers_and_transformers_open_our_shards(goldens, tmp_path, library, name, dtype):
    kind, config, params = opened(goldens / name)
    names, values = kind.names(config), kind.write(config)
    weights.save(tmp_path, params, names, values, dtype=dtype, max_shard_size=2000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, report = opened_by_them(library, tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    first, second = (
        {key: tensor.numpy().astype(dtype) for key, tensor in model.state_dict().items()}
        for model in (model, opened_by_them(library, goldens / name))
    )
    assert_same(first, second)


@pytest.mark.parametrize(("library", "name"), NETWORKS)
def test_shards_of_diffusers_and_transformers_are_read(goldens, tmp_path, library, name):
    _, _, params = opened(goldens / name)
    opened_by_them(library, goldens / name).save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(opened(tmp_path)[2], params)


PROCESS = """
import sys
from pathlib import Path
import jax
from jax.sharding import NamedSharding, PartitionSpec
from ldm_jax.models import weights
from ldm_jax.models.networks import described, make_network

number, address, source, to = sys.argv[1:]
jax.distributed.initialize(address, 2, int(number))
kind, config = described(Path(source))
like = jax.eval_shape(make_network(config).init, jax.random.key(0))
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

def place(leaf):
    divided = bool(leaf.shape) and leaf.shape[-1] % 4 == 0
    axes = [None] * (leaf.ndim - 1) + ["data"] if divided else []
    return NamedSharding(mesh, PartitionSpec(*axes))

names, places = kind.names(config), jax.tree.map(place, like)
params = weights.load(source, like, names, shardings=places)
assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
weights.save(to, params, names, kind.write(config), max_shard_size=5000)
print(weights.fingerprint(params))
"""


@pytest.mark.slow
def test_parameters_that_processes_divide_are_read_and_written(goldens, tmp_path):
    with socket.socket() as server:
        server.bind(("localhost", 0))
        address = f"localhost:{server.getsockname()[1]}"
    words = [address, str(goldens / "t5"), str(tmp_path)]
    flags = "--xla_force_host_platform_device_count=2"
    path = str(Path(weights.__file__).parents[2])
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # it is one process's
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(number), *words],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    _, _, params = opened(goldens / "t5")
    assert {text.splitlines()[-1] for text in outputs} == {weights.fingerprint(params)}
    assert_same(opened(tmp_path)[2], params)
    assert_same(tensors_of(tmp_path), load_file(goldens / "t5" / "model.safetensors"))
