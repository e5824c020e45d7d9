import functools
import json
import runpy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from specimens import error, outputs_of

from ldm_jax.metrics.resize import as_torch_fidelity, to_images
from ldm_jax.models import weights
from ldm_jax.models.inception import Inception, InceptionConfig
from ldm_jax.models.names import entries
from ldm_jax.nn.functional import functional

SMALL = InceptionConfig(divisor=16)


@functools.cache
def network(config):
    init, apply = functional(lambda rngs: Inception(config, rngs))
    return jax.eval_shape(init, jax.random.key(0)), jax.jit(apply)


@functools.cache
def script(goldens):
    return runpy.run_path(str(goldens / "make_inception_goldens.py"))


def write_live(goldens, directory, **options):
    """A new directory of torch-fidelity's answers, with the extra `parity`."""
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script(goldens)["write"](directory, **options)
    return directory


def store(goldens, answers, directory):
    """The file of weights that the answers are of, with all its tensors, and no others."""
    shapes = json.loads((answers / "shapes.json").read_text())
    drawn = script(goldens)["draw"](shapes, int(outputs_of(answers)["seed"]))
    save_file(drawn, directory / "model.safetensors")


def check(goldens, answers, config, tmp_path):
    like, apply = network(config)
    expected = outputs_of(answers)
    store(goldens, answers, tmp_path)
    params = weights.load(tmp_path, like, config.names)
    output = apply(params, as_torch_fidelity(to_images(expected["pixels"])))
    for name, given in output._asdict().items():
        assert error(given, expected[name]) < 1e-5, name


def test_it_answers_as_torch_fidelity_does(goldens, tmp_path):
    check(goldens, goldens / "inception", SMALL, tmp_path)


def test_it_answers_as_live_torch_fidelity_does(goldens, tmp_path):
    live = write_live(goldens, tmp_path / "live", seed=1)
    check(goldens, live, SMALL, tmp_path)


def test_on_one_cpu_it_takes_images_one_by_one_and_answers_alike(goldens, tmp_path):
    like, _ = network(SMALL)
    store(goldens, goldens / "inception", tmp_path)
    params = weights.load(tmp_path, like, SMALL.names)
    expected = outputs_of(goldens / "inception")
    images = as_torch_fidelity(to_images(expected["pixels"]))
    apply = functional(lambda rngs: Inception(SMALL, rngs)).apply
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        (loop,) = loops(jax.make_jaxpr(apply)(params, images))
        output = jax.jit(apply)(*jax.device_put((params, images), jax.devices()[0]))
    assert loop.params["length"] == len(images) > 1
    assert not loops(jax.make_jaxpr(apply)(params, images))
    for name, given in output._asdict().items():
        assert error(given, expected[name]) < 1e-5, name


def loops(jaxpr):
    return [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]


@pytest.mark.full_size
def test_at_its_real_widths_it_answers_as_live_torch_fidelity_does(goldens, tmp_path):
    live = write_live(goldens, tmp_path / "live", seed=2, divisor=1)
    check(goldens, live, InceptionConfig(), tmp_path)


def test_tensors_survive_the_way_through_our_files_bit_for_bit(goldens, tmp_path):
    store(goldens, goldens / "inception", tmp_path)
    like, _ = network(SMALL)
    params = weights.load(tmp_path, like, SMALL.names)
    weights.save(tmp_path / "ours", params, SMALL.names, SMALL.to_dict())
    again = weights.load(tmp_path / "ours", like, SMALL.names)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert InceptionConfig.from_dict(weights.read_config(tmp_path / "ours")) == SMALL


def test_the_released_widths_are_the_default(goldens):
    """Under all the names of torch-fidelity's tensors but those of counters; some of its shapes."""
    like, _ = network(InceptionConfig())
    shapes = {entry.key: entry.shape for entry in entries(like, InceptionConfig().names)}
    theirs = json.loads((goldens / "inception" / "shapes.json").read_text())
    assert shapes.keys() == {key for key in theirs if not key.endswith("num_batches_tracked")}
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_5b.branch5x5_2.conv.weight"] == (64, 48, 5, 5)
    assert shapes["Mixed_6c.branch7x7_2.conv.weight"] == (160, 160, 1, 7)
    assert shapes["Mixed_7c.branch3x3dbl_1.conv.weight"] == (448, 2048, 1, 1)
    assert shapes["fc.weight"] == (1008, 2048)


def test_images_of_any_size_are_taken_from_75_pixels_on():
    like, apply = network(SMALL)
    output = jax.eval_shape(apply, like, jnp.zeros((3, 75, 131, 3)))
    assert [leaf.shape for leaf in output] == [(3, 128), (3, 1008), (3, 1008)]
    with pytest.raises(ValueError, match="images of 74 x 131 pixels; Inception takes at least 75"):
        jax.eval_shape(apply, like, jnp.zeros((3, 74, 131, 3)))


def test_a_divisor_that_is_not_one_of_all_widths_is_refused():
    with pytest.raises(ValueError, match="divisor is 3; it can be 1, 2, 4, 8, 16"):
        InceptionConfig(divisor=3)
