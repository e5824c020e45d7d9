import contextlib
import gc
import logging
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from orbax.checkpoint import v1 as ocp

from ldm_jax.parallel import MeshConfig, make_mesh
from ldm_jax.training import TrainingError, abstract_state, init_state
from ldm_jax.training.checkpoints import Checkpoints, _fingerprint

# Arrays of less than 1 kB would lie in Orbax's index instead of its data.
INIT = partial(toy.init, ballast=200)


@pytest.fixture(scope="module")
def fresh():
    return init_state(INIT, toy.optimizer(), jax.random.key(0))


@pytest.fixture(scope="module")
def abstract():
    return abstract_state(INIT, toy.optimizer())


def at(state, examples):
    """A state that differs from others in its count and in its parameters."""
    params = jax.tree.map(lambda x: x + examples, state.params)
    return state._replace(examples=jnp.uint32(examples), params=params)


def saved(directory, state, *counts, keep=3):
    checkpoints = Checkpoints(directory, keep)
    for examples in counts:
        checkpoints.save(at(state, examples))
    checkpoints.wait()
    return checkpoints


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, toy.host(one), toy.host(other))


def names(directory):
    return sorted(int(path.name) for path in Path(directory).iterdir())


def test_what_is_restored_is_what_was_saved(tmp_path, fresh, abstract):
    saved(tmp_path, fresh, 8, 16)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 16
    restored = checkpoints.restore(abstract)
    assert_equal(restored, at(fresh, 16))
    assert jax.tree.structure(restored) == jax.tree.structure(fresh)


def test_a_relative_directory_will_do(tmp_path, monkeypatch, fresh, abstract):
    monkeypatch.chdir(tmp_path)
    saved("runs/demo", fresh, 8)
    assert_equal(Checkpoints("runs/demo").restore(abstract), at(fresh, 8))


@pytest.mark.parametrize("config", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=4)])
def test_a_checkpoint_is_restored_onto_any_mesh(tmp_path, config):
    one = toy.Run(tmp_path)
    before = one.go(until=40)
    other = toy.Run(tmp_path, make_mesh(config))
    after = other.state()
    assert_equal(before, after)
    for leaf, plan in zip(jax.tree.leaves(after), jax.tree.leaves(other.abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(plan.sharding, leaf.ndim)
    at_once = toy.Run(tmp_path / "other").go(until=80)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, toy.host(other.go(until=80)), toy.host(at_once))


def test_single_fields_are_read_without_the_rest(tmp_path, fresh, abstract):
    checkpoints = saved(tmp_path, fresh, 8)
    restored = checkpoints.restore(abstract, only=("params", "step"))
    assert_equal(restored.params, at(fresh, 8).params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(restored.ema))


def test_others_can_read_a_checkpoint_without_this_library(tmp_path, fresh):
    saved(tmp_path, fresh, 8)
    with pytest.warns(UserWarning, match="[Ss]harding"):
        tree = ocp.load(tmp_path / "000000000008")
    np.testing.assert_array_equal(tree["ema"]["dense"]["kernel"], fresh.ema["dense"]["kernel"])


def test_the_newest_are_kept_and_none_is_deleted_before_a_newer_one_is_whole(tmp_path, fresh):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for saves, examples in enumerate((8, 16, 24, 32)):
        checkpoints.save(at(fresh, examples))
        assert len(list(tmp_path.glob("*/commit_success.txt"))) >= min(2, saves)
    checkpoints.wait()
    assert names(tmp_path) == [24, 32]


def test_a_save_asked_for_during_a_save_is_made(tmp_path, fresh, abstract, monkeypatch):
    running = []
    save_async = ocp.save_async

    def watched(*args, **kwargs):
        assert not any(thread.running for thread in running)
        running.append(Slow(save_async(*args, **kwargs)))
        return running[-1]

    class Slow:
        """A save that is not over before somebody waits for it."""

        def __init__(self, response):
            self.response, self.running = response, True

        def result(self):
            time.sleep(0.05)
            self.response.result()
            self.running = False

    monkeypatch.setattr(ocp, "save_async", watched)
    saved(tmp_path, fresh, 8, 16, 24, keep=5)
    assert names(tmp_path) == [8, 16, 24]
    assert_equal(Checkpoints(tmp_path).restore(abstract), at(fresh, 24))


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
    run = toy.Run(tmp_path, ballast=20_000)
    state, copy = run.state(), jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    for i in range(5):
        expected = toy.host(copy(state))
        run.checkpoints.save(state)
        for j in range(5):
            state, _ = run.step(state, toy.batch(8 * (5 * i + j)))
        assert_equal(run.checkpoints.restore(run.abstract), expected)


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 16
    path.write_bytes(bytes(data))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_arrays(checkpoint):
    largest = max((checkpoint / "state" / "ocdbt.process_0" / "d").iterdir(), key=os.path.getsize)
    flip(largest)


def cut_arrays(checkpoint):
    largest = max((checkpoint / "state" / "ocdbt.process_0" / "d").iterdir(), key=os.path.getsize)
    cut(largest)


def flip_manifest(checkpoint):
    path = checkpoint / "_CHECKPOINT_METADATA"
    text = path.read_text()
    assert "params/dense/kernel" in text
    path.write_text(text.replace("params/dense/kernel", "params/dense/kernal"))


def cut_metadata(checkpoint):
    cut(checkpoint / "state" / "_METADATA")


def lose_the_index(checkpoint):
    (checkpoint / "state" / "manifest.ocdbt").unlink()
    (checkpoint / "state" / "ocdbt.process_0" / "manifest.ocdbt").unlink()


DAMAGES = [flip_arrays, cut_arrays, flip_manifest, cut_metadata, lose_the_index]


@pytest.fixture
def dropped():
    """A load that fails leaves coroutines of Orbax behind; collects them within their test."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("dropped")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path, fresh, abstract, caplog, damage
):
    saved(tmp_path, fresh, 8, 16)
    damage(tmp_path / "000000000016")
    checkpoints = Checkpoints(tmp_path)
    with caplog.at_level(logging.WARNING, "ldm_jax"):
        restored = checkpoints.restore(abstract)
    assert_equal(restored, at(fresh, 8))
    (message,) = [
        record.getMessage() for record in caplog.records if record.name.startswith("ldm_jax")
    ]
    assert re.search(r"000000000016 is damaged and not used: ", message)
    assert len(message) < 600 and "\n" not in message
    assert checkpoints.latest() == 8
    checkpoints.save(at(fresh, 16))  # the run comes to the same place again
    checkpoints.wait()
    assert_equal(Checkpoints(tmp_path).restore(abstract), at(fresh, 16))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("dropped")
def test_when_all_are_damaged_training_does_not_start_afresh(tmp_path, fresh, abstract, caplog):
    saved(tmp_path, fresh, 8, 16)
    for path in sorted(tmp_path.iterdir()):
        flip_arrays(path)
    with pytest.raises(FileNotFoundError, match="no sound checkpoint in"):
        Checkpoints(tmp_path).restore(abstract)
    assert caplog.text.count("is damaged") == 2


def test_what_a_killed_save_left_is_neither_used_nor_kept(tmp_path, fresh, abstract):
    saved(tmp_path, fresh, 8)
    torn = tmp_path / "000000000016.orbax-checkpoint-tmp"
    torn.mkdir()
    uncommitted = tmp_path / "000000000024"  # as object stores have it, which cannot rename
    uncommitted.mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 8
    assert_equal(checkpoints.restore(abstract), at(fresh, 8))
    assert torn.exists()  # a reader deletes nothing
    checkpoints.save(at(fresh, 24))
    checkpoints.wait()
    assert not torn.exists()
    assert checkpoints.latest() == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"extra": jnp.zeros(2)}, "lacks ema/extra"),
        (lambda p: {"ballast": p["ballast"]}, "beyond .* ema/dense/bias"),
        (
            lambda p: p | {"dense": p["dense"] | {"bias": jnp.zeros(5)}},
            r"holds params/dense/bias as float32\[4\], asked for is float32\[5\]",
        ),
        (
            lambda p: p | {"dense": p["dense"] | {"bias": jnp.zeros(4, jnp.bfloat16)}},
            r"params/dense/bias as float32\[4\], asked for is bfloat16\[4\]",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_an_error_that_names_the_leaf(
    tmp_path, fresh, change, message
):
    saved(tmp_path, fresh, 8, 16)
    other = abstract_state(lambda key: change(INIT(key)), toy.optimizer())
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path).restore(other)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, fresh):
    checkpoints = saved(tmp_path, fresh, 8)
    poisoned = at(fresh, 16)
    poisoned.params["dense"]["bias"] = poisoned.params["dense"]["bias"].at[2].set(jnp.nan)
    with pytest.raises(TrainingError, match=r"16 examples .* not finite .* params/dense/bias"):
        checkpoints.save(poisoned)
    assert names(tmp_path) == [8]


FULL = """
import resource, signal, sys
import jax, toy
from ldm_jax.training.checkpoints import Checkpoints
import test_checkpoints as tests

state = tests.init_state(tests.INIT, toy.optimizer(), jax.random.key(0))
abstract = tests.abstract_state(tests.INIT, toy.optimizer())
checkpoints = tests.saved(sys.argv[1], state, 8)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (256, -1))
for examples in (16, 24):
    try:
        checkpoints.save(tests.at(state, examples))
        checkpoints.wait()
    except OSError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
tests.assert_equal(checkpoints.restore(abstract), tests.at(state, 8))
checkpoints.save(tests.at(state, 32))
checkpoints.wait()
print("latest", checkpoints.latest(), "left", sorted(p.name for p in checkpoints.directory.iterdir()))
"""


def python(*arguments, **kwargs):
    root = Path(__file__).parents[2]
    paths = {"PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parent)])}
    environment = os.environ | paths | {"XLA_FLAGS": "", "PYTHONWARNINGS": "error"}
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment, **kwargs)


def test_a_disk_without_room_is_said_before_the_save(tmp_path, fresh, abstract, monkeypatch):
    checkpoints = saved(tmp_path, fresh, 8)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=20_000))
    with pytest.raises(OSError, match=r"takes 0.0[0-9]* MB and 0.0 MB are free"):
        checkpoints.save(at(fresh, 16))
    assert_equal(checkpoints.restore(abstract), at(fresh, 8))


@pytest.mark.slow
def test_a_disk_that_fills_during_the_save_leaves_the_last_good_checkpoint(tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = python("-c", FULL, tmp_path, **pipes)
    out, err = process.communicate()
    assert process.returncode == 0, err
    first, second, last = out.splitlines()
    for line, examples in ((first, 16), (second, 24)):
        start = f"The checkpoint of {examples} examples could not be written to {tmp_path} "
        assert line.startswith(start)
        assert line.endswith("the newest whole one there is of 8 examples.")
        assert "File too large" in line
    assert last == "latest 32 left ['000000000008', '000000000032']"
    assert "orbax" not in err


def test_a_directory_that_cannot_be_written_is_said(tmp_path, fresh):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match=r"checkpoint of 8 examples could not be written to .*taken"):
        Checkpoints(tmp_path / "taken").save(at(fresh, 8))


@pytest.mark.parametrize("stops", [(8, 16, 120), (24, 56, 104, 120)])
def test_a_run_that_was_stopped_and_resumed_ends_as_one_that_was_not(tmp_path, stops):
    whole = toy.Run(tmp_path / "whole").go(until=120)
    for stop in stops:
        parts = toy.Run(tmp_path / "parts").go(until=stop)
    assert_equal(whole, parts)


def test_a_run_of_which_the_last_steps_were_lost_ends_as_one_that_was_not(tmp_path):
    whole = toy.Run(tmp_path / "whole").go(until=120)
    run = toy.Run(tmp_path / "parts")
    run.go(until=40)
    toy.Run(tmp_path / "parts").go(until=72, hooks=[])  # nothing of this is saved
    assert run.checkpoints.latest() == 40
    assert_equal(whole, toy.Run(tmp_path / "parts").go(until=120))


def test_every_flipped_bit_and_every_swap_changes_the_digest():
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    bits = np.repeat(values.view(np.uint32)[None], values.size * 32, axis=0)
    for i in range(values.size * 32):
        bits[i].flat[i // 32] ^= np.uint32(1) << np.uint32(i % 32)
    swaps = np.stack([np.roll(values, 1), values[::-1], values[:, ::-1]]).view(np.uint32)
    changed = jnp.asarray(np.concatenate([bits, swaps]).view(np.float32))
    digests = np.asarray(jax.vmap(_fingerprint)(changed))[:, 0]
    assert int(_fingerprint(jnp.asarray(values))[0]) not in digests
    assert len(set(digests.tolist())) == len(digests)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
def test_the_digest_does_not_depend_on_how_the_array_lies_on_the_devices(dtype):
    array = jnp.arange(64).reshape(8, 8).astype(dtype)
    whole = _fingerprint(array)
    for config in (MeshConfig(fsdp=4), MeshConfig(data=2, fsdp=2, tensor=2)):
        mesh = make_mesh(config)
        for spec in (("data",), ("fsdp", "tensor"), (None, ("data", "tensor"))):
            sharding = jax.NamedSharding(mesh, jax.P(*spec))
            np.testing.assert_array_equal(_fingerprint(jax.device_put(array, sharding)), whole)


def kill_when(process, moment):
    """Kills a process without warning at a moment, unless it ends before."""
    while process.poll() is None and not moment():
        time.sleep(0.001)
    process.kill()
    process.wait()


def newly_saved(saves, before):
    return set(saves.glob("0*/commit_success.txt")) - before


def saving(saves, start):
    """Whether a save is under way that began after `start`."""
    with contextlib.suppress(FileNotFoundError):
        return any(path.stat().st_mtime > start for path in saves.glob("*tmp*/*"))


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_ends_bit_for_bit_as_one_that_is_not(tmp_path):
    """Every second time in the middle of a save, else at a random moment after one."""
    script, until, rng = Path(__file__).parent / "toy.py", 1600, np.random.default_rng()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    assert python(script, whole, until).wait() == 0
    saves, during_saves = killed / "checkpoints", 0
    for kill in range(10):
        before = newly_saved(saves, set())
        process = python(script, killed, until)
        if kill % 2:
            kill_when(process, lambda start=time.time(): saving(saves, start))
            during_saves += any(saves.glob("*tmp*"))
        else:
            pause = rng.uniform(0.0, 0.5)
            kill_when(
                process, lambda b=before, s=pause: newly_saved(saves, b) and not time.sleep(s)
            )
        assert not (killed / "final.npz").exists()
    assert during_saves > 0
    assert python(script, killed, until).wait() == 0
    with np.load(whole / "final.npz") as one, np.load(killed / "final.npz") as other:
        assert one.files == other.files
        for name in one.files:
            np.testing.assert_array_equal(one[name], other[name])
