"""From pixels to scores: resizing, network and arithmetic together, beside torch-fidelity's."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from sets import peer

from ldm_jax.metrics.frechet import frechet_distance, moments
from ldm_jax.metrics.inception_score import inception_score_of_splits
from ldm_jax.metrics.kernel import kid_of_subsets
from ldm_jax.metrics.precision_recall import precision_recall
from ldm_jax.metrics.resize import as_torch_fidelity, to_images
from ldm_jax.models import weights
from ldm_jax.models.inception import InceptionConfig, InceptionOutput
from ldm_jax.models.networks import make_network

GOLDENS = Path(__file__).parent.parent / "goldens"
CONFIG = InceptionConfig(divisor=16)  # 128 features
COUNT, BATCH = 160, 40


def draw_pixels(seed, contrast):
    """Noise on a ground, both of another colour in every image."""
    rng = np.random.default_rng(seed)
    ground, amount = rng.uniform(0, 255, (2, COUNT, 1, 1, 3))
    noise = rng.normal(size=(COUNT, 24, 30, 3))
    return np.clip(ground + contrast * amount * noise, 0, 255).astype(np.uint8)


def by_torch_fidelity(network, pixels):
    import torch

    with torch.inference_mode():
        parts = [network(torch.from_numpy(each)) for each in batches(np.moveaxis(pixels, -1, 1))]
    return InceptionOutput(*(torch.cat(part).numpy() for part in zip(*parts, strict=True)))


def by_us(network, pixels, directory):
    tensors = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
    save_file(tensors, directory / "model.safetensors")
    init, apply = make_network(CONFIG)
    like = jax.eval_shape(init, jax.random.key(0))
    params = weights.load(directory, like, CONFIG.names)
    score = jax.jit(lambda pixels: apply(params, as_torch_fidelity(to_images(pixels))))
    parts = [score(each) for each in batches(pixels)]
    return jax.tree.map(lambda *part: np.concatenate(part), *parts)


def batches(pixels):
    return [pixels[at : at + BATCH].copy() for at in range(0, COUNT, BATCH)]


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Ours and theirs of two sets of images, from the same random weights."""
    peer("torch_fidelity")
    network = runpy.run_path(str(GOLDENS / "make_inception_goldens.py"))["make_network"](16, seed=1)
    sets = draw_pixels(0, 0.1), draw_pixels(1, 1.0)
    directory = tmp_path_factory.mktemp("weights")
    ours = [by_us(network, pixels, directory) for pixels in sets]
    return ours, [by_torch_fidelity(network, pixels) for pixels in sets]


def test_features_are_alike(features):
    for ours, theirs in zip(*features, strict=True):
        for name, expected in theirs._asdict().items():
            error = np.abs(getattr(ours, name) - expected).max() / np.abs(expected).max()
            assert error < 1e-4, name


def scores(ours):
    """As torch-fidelity names them, of the same subsets and splits that it draws."""
    (x, *_), (y, *_) = ours
    kid = kid_of_subsets(x, y, subsets=5, size=100, seed=2)
    isc = inception_score_of_splits(ours[0].unbiased, splits=4, seed=2)
    precision, recall = precision_recall(x, y)
    return {
        "frechet_inception_distance": frechet_distance(moments(x), moments(y)),
        "kernel_inception_distance_mean": kid[0],
        "kernel_inception_distance_std": kid[1],
        "inception_score_mean": isc[0],
        "inception_score_std": isc[1],
        "precision": precision.value,
        "recall": recall.value,
    }


def scores_of_torch_fidelity(theirs):
    import torch

    x, y = (torch.from_numpy(each.pooled) for each in theirs)
    fid, kid, isc, prc = (
        peer(f"torch_fidelity.metric_{name}") for name in ("fid", "kid", "isc", "prc")
    )
    quiet = {"verbose": False}
    statistics = map(fid.fid_features_to_statistics, (x, y))
    options = {"kid_subsets": 5, "kid_subset_size": 100, "rng_seed": 2, **quiet}
    logits = torch.from_numpy(theirs[0].unbiased)
    return {
        **fid.fid_statistics_to_metric(*statistics, False),
        **kid.kid_features_to_metric(x, y, **options),
        **isc.isc_features_to_metric(logits, splits=4, rng_seed=2),
        **prc.prc_features_to_metric(x, y, prc_neighborhood=3, **quiet),
    }


def test_scores_are_alike(features):
    ours, theirs = scores(features[0]), scores_of_torch_fidelity(features[1])
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], rel=1e-3), name
