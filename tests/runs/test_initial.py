"""A run that begins from given weights, and the objectives that say what may differ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ldm_jax.models.names import flatten
from ldm_jax.parallel import MeshConfig
from ldm_jax.runs.initial import Given, fitted
from ldm_jax.runs.run import Run
from ldm_jax.settings.schema import to_json
from ldm_jax.tasks import OBJECTIVES, Difference
from ldm_jax.tasks.objective import fresh_value, zero_channels
from ldm_jax.tasks.pretraining import Pretraining

UNET = tiny.TINY.backbone


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """The directory of a run with a checkpoint, whose average is not its parameters."""
    run = Run(tiny.TINY, tmp_path_factory.mktemp("parent"))
    state = run.training.init()
    shifted = state._replace(ema=jax.tree.map(lambda leaf: leaf + 1, state.params))
    run.checkpoints.save(shifted)
    run.checkpoints.wait()
    (run.workdir / "config.json").write_text(to_json(tiny.TINY))
    return run.workdir


def child(parent, **changes):
    return Run(dataclasses.replace(tiny.TINY, initial=str(parent), **changes), parent / "child")


def test_a_run_begins_from_the_average_of_its_parent_on_another_mesh(parent):
    run = child(parent, mesh=MeshConfig(data=2, fsdp=4))
    state = run.state()
    expected = Run(tiny.TINY, parent).checkpoints.restore(Run(tiny.TINY).training.abstract).ema
    for path, leaf in flatten(state.params).items():
        np.testing.assert_array_equal(leaf, flatten(expected)[path])
        np.testing.assert_array_equal(leaf, flatten(state.ema)[path])
    assert int(state.examples) == int(state.step) == 0
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state.params)} == {8}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_res_blocks": 2}, "it has no down_blocks/0"),
        ({"transformer_depth": (0,)}, "it has .*, and this backbone has not"),
        ({"channels": (24,), "head_width": 24}, r"has the shape \(16,\) there and \(24,\) here"),
        ({"num_groups": 8}, "norm_num_groups is 4 there and 8 here"),
    ],
)
def test_a_parameter_too_many_too_few_or_of_another_shape_is_named(parent, changes, said):
    with pytest.raises(ValueError, match=said):
        child(parent, backbone=dataclasses.replace(UNET, **changes)).initial()


def test_a_directory_that_holds_no_weights_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither a run .* nor a pipeline"):
        child(tmp_path).initial()


@dataclasses.dataclass(frozen=True)
class Widened(Pretraining):
    """Pretraining whose first convolution may take more channels, and which trains that convolution only."""

    differs = (Difference("conv_in/kernel", zero_channels, "in_channels"),)
    trained = ("conv_in/*",)


def test_an_objective_says_what_may_differ_and_added_channels_start_at_zero(parent):
    wide = dataclasses.replace(UNET, in_channels=8)
    (fresh,) = (Run(tiny.TINY).training.init().params for _ in range(1))
    given = Given(UNET, fresh, "there")
    kernel = fresh["conv_in"]["kernel"]
    placed = lambda shape: jax.device_put(jnp.ones(shape), kernel.sharding)  # noqa: E731
    bigger = fresh | {"conv_in": fresh["conv_in"] | {"kernel": placed((3, 3, 8, 16))}}
    made = fitted(given, wide, bigger, Widened.differs)["conv_in"]["kernel"]
    np.testing.assert_array_equal(made[:, :, :4], kernel)
    assert not np.any(made[:, :, 4:])
    with pytest.raises(ValueError, match=r"conv_in/kernel .*: only input channels may be added"):
        fitted(given, wide, fresh | {"conv_in": {"kernel": placed((1, 1, 8, 16))}}, Widened.differs)
    assert fresh_value(kernel, None) is kernel


def test_only_the_parameters_that_an_objective_trains_change(parent, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "widened", Widened)
    run = child(parent, objective=Widened())
    state = run.state()
    before = jax.tree.map(np.asarray, state.params)
    batch = run.empty_batch()
    rows = jax.tree.map(lambda leaf: np.repeat(leaf, 8, axis=0), batch)
    rows = rows._replace(latents=rows.latents + 1, index=np.arange(8, dtype=np.uint32))
    after, _ = jax.jit(run.training.step)(state, run.frozen.params, rows)
    changed = {
        path
        for path, leaf in flatten(after.params).items()
        if np.any(np.asarray(leaf) != flatten(before)[path])
    }
    assert changed == {"conv_in/kernel", "conv_in/bias"}


@dataclasses.dataclass(frozen=True)
class Taught(Pretraining):
    """Pretraining that asks for a frozen backbone beside the run's networks."""

    teacher: str = ""

    def networks(self):
        return {"teacher": self.teacher}


def test_a_frozen_network_that_an_objective_asks_for_is_among_the_frozen_parameters(parent):
    run = child(parent, objective=Taught(str(parent)))
    teacher = flatten(run.frozen.params["teacher"])
    assert teacher.keys() == flatten(run.training.abstract.params).keys()


def test_a_batch_without_what_the_objective_needs_is_refused():
    batch = Run(tiny.TINY).empty_batch()
    assert Pretraining().needs(batch) == ""
    assert "captions" in Pretraining().needs(batch._replace(cond=None))
