"""Sets of features to score, and the peers that score them too."""

import contextlib
import functools
import importlib
import warnings

import numpy as np
import pytest


def two_sets():
    """Features with zeros and long tails, as a network's are: 300 and 400 samples of 24 dimensions."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(24, 24)) / 5
    x = rng.normal(size=(300, 24)) @ mix
    y = 1.2 * rng.normal(size=(400, 24)) @ mix + 0.1
    return np.maximum(x, 0), np.maximum(y, 0)


@functools.cache
def peer(name):
    """A module of torch-fidelity or clean-fid, or a skip; both import torchvision, which is there without operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):  # a torchvision with operators has them defined
                library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        pytest.importorskip(name.partition(".")[0])
        peer.library = library  # what it defines ends with it
        return importlib.import_module(name)
