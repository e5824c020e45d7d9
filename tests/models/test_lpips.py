import functools
import json
import re
import runpy
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from specimens import error, outputs_of

from ldm_jax.models import weights
from ldm_jax.models.lpips import LPIPS, TRUNKS, LPIPSConfig
from ldm_jax.nn.functional import functional

FILE = "diffusion_pytorch_model.safetensors"


def written_by_lpips(goldens, directory, **options):
    """New directories, with the extra `parity`."""
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make = runpy.run_path(str(goldens / "make_lpips_goldens.py"))
        make["write"](directory, seed=1, **options)
    return directory


@pytest.fixture(scope="module", params=["committed", "live"])
def lpips_answers(request, goldens, tmp_path_factory):
    if request.param == "committed":
        return goldens / "lpips"
    return written_by_lpips(goldens, tmp_path_factory.mktemp("live"))


@functools.cache
def opened(directory):
    config = LPIPSConfig.from_dict(weights.read_config(directory))
    init, apply = functional(lambda rngs: LPIPS(config, rngs))
    like = jax.eval_shape(init, jax.random.key(0))
    return config, weights.load(directory, like, config.names), jax.jit(apply)


def distances(directory):
    expected = outputs_of(directory)
    _, params, apply = opened(directory)
    return apply(params, expected["images"], expected["others"]), expected["distances"]


@pytest.mark.parametrize("net", TRUNKS)
def test_distances_are_those_of_the_lpips_package(lpips_answers, net):
    ours, theirs = distances(lpips_answers / net)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert error(ours, theirs) < 1e-5


@pytest.mark.full_size
@pytest.mark.parametrize("net", TRUNKS)
def test_distances_of_the_whole_networks_are_those_of_the_lpips_package(goldens, net, tmp_path):
    written_by_lpips(goldens, tmp_path, divisors={net: 1})
    assert error(*distances(tmp_path / net)) < 1e-4


@pytest.mark.parametrize("net", TRUNKS)
def test_a_distance_is_symmetric_and_zero_for_itself(goldens, net):
    _, params, apply = opened(goldens / "lpips" / net)
    given = outputs_of(goldens / "lpips" / net)
    one_way = apply(params, given["images"], given["others"])
    np.testing.assert_allclose(apply(params, given["others"], given["images"]), one_way, rtol=1e-6)
    np.testing.assert_array_equal(apply(params, given["images"], given["images"]), 0)
    assert np.min(one_way) > 0


@pytest.mark.parametrize("net", TRUNKS)
def test_a_distance_is_linear_in_the_learned_weights(goldens, net):
    _, params, apply = opened(goldens / "lpips" / net)
    given = outputs_of(goldens / "lpips" / net)
    learned = {name: params[name] for name in params if name.startswith("lin")}
    scaled = {**params, **jax.tree.map(lambda kernel: 3 * kernel, learned)}
    ours, thrice = (apply(p, given["images"], given["others"]) for p in (params, scaled))
    np.testing.assert_allclose(thrice, 3 * ours, rtol=1e-5)


@pytest.mark.parametrize("net", TRUNKS)
def test_features_have_unit_norm_in_every_map(goldens, net):
    config, params, _ = opened(goldens / "lpips" / net)
    apply = functional(lambda rngs: LPIPS(config, rngs)).apply
    images = outputs_of(goldens / "lpips" / net)["images"]
    for features in jax.jit(lambda p: apply(p, images, method="maps"))(params):
        norm = np.linalg.norm(features, axis=-1)
        np.testing.assert_allclose(norm[norm > 0], 1, rtol=1e-4)


@pytest.mark.parametrize("net", TRUNKS)
def test_tensors_survive_the_way_through_our_files_under_torchvisions_names(goldens, net, tmp_path):
    config, params, _ = opened(goldens / "lpips" / net)
    weights.save(tmp_path, params, config.names, config.to_dict())
    theirs = load_file(goldens / "lpips" / net / FILE)
    kept = {
        re.sub(r"net\.slice\d", "features", key): tensor
        for key, tensor in theirs.items()
        if re.match(r"net\.|lin\d", key)
    }
    ours = load_file(tmp_path / FILE)
    assert ours.keys() == kept.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, kept)
    assert opened(tmp_path)[0] == config


def test_a_whole_trunk_of_torchvision_beside_the_learned_weights_is_read(goldens, tmp_path):
    directory = goldens / "lpips" / "alex"
    config, params, _ = opened(directory)
    weights.save(tmp_path, params, config.names, config.to_dict())
    tensors = load_file(tmp_path / FILE) | {"classifier.6.bias": np.zeros(1000, "f")}
    save_file(tensors, tmp_path / FILE)
    jax.tree.map(np.testing.assert_array_equal, opened(tmp_path)[1], params)


@pytest.mark.parametrize("net", TRUNKS)
def test_the_least_image_has_a_distance_and_a_smaller_one_is_refused(net):
    init, apply = functional(lambda rngs: LPIPS(LPIPSConfig(net, divisor=64), rngs))
    params, least = init(jax.random.key(0)), TRUNKS[net].least
    images = jax.random.uniform(jax.random.key(1), (2, 2, least, least + 8, 3))
    assert np.all(np.isfinite(apply(params, *images)))
    with pytest.raises(ValueError, match=rf"LPIPS with {net} takes {least} or more"):
        apply(params, *images[:, :, 1:])


@pytest.mark.parametrize(("net", "published"), [("alex", 2_469_696), ("vgg", 14_714_688)])
def test_trunks_have_as_many_parameters_as_torchvisions(net, published):
    init, _ = functional(lambda rngs: LPIPS(LPIPSConfig(net), rngs))
    features = jax.eval_shape(init, jax.random.key(0))["features"]
    assert sum(leaf.size for leaf in jax.tree.leaves(features)) == published


@pytest.mark.parametrize("config", [LPIPSConfig(), LPIPSConfig("vgg", divisor=4)])
def test_configs_survive_the_way_through_json(config):
    assert LPIPSConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"net": "squeeze"}, "net is 'squeeze'; LPIPS has alex, vgg"),
        ({"divisor": 3}, "divisor is 3; it divides 64"),
        ({"version": "0.0"}, "version='0.0' is not supported; only version='0.1' is"),
    ],
)
def test_bad_configs_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        LPIPSConfig.from_dict(values)
