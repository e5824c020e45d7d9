"""The arithmetic of layouts: memory against what is counted by hand and by the compiler, order against itself."""

import dataclasses

import jax
import pytest

from ldm_jax.parallel import MeshConfig
from ldm_jax.planning import layouts, programs
from ldm_jax.planning.aot import topology
from ldm_jax.runs.config import RunConfig
from ldm_jax.settings.command_line import parse

pytest.importorskip("libtpu")
WORDS = (
    "--config=configs/text_to_image.py:pixart-1152-d28",
    "--config.backbone.pixart.depth=4",
    "--config.data.text_embeddings=true",
    "--config.train.batch=64",
)


@pytest.fixture(scope="module")
def config():
    return parse(WORDS, RunConfig, in_workdir=False).config


@pytest.fixture(scope="module")
def devices():
    return topology("v5e:2x4")


@pytest.fixture(scope="module")
def found(config, devices):
    return {estimate.layout: estimate for estimate in layouts.estimates(config, devices)}


def test_a_device_holds_its_part_of_a_state_its_gradient_and_what_is_kept_of_its_images(
    config, devices, found
):
    """20 bytes a parameter, in one part: itself, its average, two moments and its gradient."""
    alone = dataclasses.replace(config, mesh=MeshConfig(data=1))
    network = programs.Planned(alone, devices=devices[:1]).network
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    layout = layouts.Layout(1, 8, 1, 1, "full")
    twice = dataclasses.replace(config, train=dataclasses.replace(config.train, batch=128))
    (other,) = (x for x in layouts.estimates(twice, devices) if x.layout == layout)
    kept = other.memory - found[layout].memory  # of 8 images more
    block = 8 * 256 * 1152 * 2  # what goes from block to block, in bfloat16
    # Of each block its input; keys and values of the text, the ends, and one block that is computed again.
    assert 60 * block < kept < 75 * block
    assert found[layout].memory - kept == pytest.approx(20 * params / 8, rel=0.02)


def test_what_is_computed_again_is_not_kept(found):
    for fsdp in (1, 2, 4, 8):
        none, dots, full = (
            found[layouts.Layout(8 // fsdp, fsdp, 1, 1, remat)]
            for remat in ("none", "dots", "full")
        )
        assert none.memory > dots.memory > full.memory
        assert none.seconds < dots.seconds < full.seconds


def test_a_block_that_is_computed_again_needs_in_the_meantime_what_one_that_is_kept_does(devices):
    words = (*WORDS, "--config.backbone.pixart.depth=1")
    needed = {"none": [], "full": []}
    for batch in (64, 128):
        config = parse(
            (*words, f"--config.train.batch={batch}"), RunConfig, in_workdir=False
        ).config
        found = {x.layout: x.memory for x in layouts.estimates(config, devices)}
        for remat, memory in needed.items():
            memory.append(found[layouts.Layout(1, 8, 1, 1, remat)])
    none, full = (more - fewer for fewer, more in needed.values())
    assert full == pytest.approx(none, rel=0.15)


def test_parameters_in_more_parts_take_less_memory(found):
    memory = [found[layouts.Layout(8 // fsdp, fsdp, 1, 1, "full")].memory for fsdp in (1, 2, 4, 8)]
    assert memory == sorted(memory, reverse=True)


def test_of_layouts_that_are_alike_in_time_the_one_that_needs_least_comes_first(found):
    fitting = [estimate for estimate in found.values() if estimate.fits]
    assert fitting == list(found.values())[: len(fitting)]
    first = fitting[0]
    assert all(first.seconds < (1 + layouts.ALIKE) * other.seconds for other in fitting)
    alike = [x for x in fitting if x.seconds < (1 + layouts.ALIKE / 4) * first.seconds]
    assert first.memory == min(x.memory for x in alike)


def test_a_batch_that_no_mesh_divides_is_refused(config, devices):
    train = dataclasses.replace(config.train, batch=12)
    with pytest.raises(ValueError, match="no mesh of 8 devices divides a batch of 12"):
        layouts.estimates(dataclasses.replace(config, train=train), devices)
