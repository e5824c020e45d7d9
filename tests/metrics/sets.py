"""Sets of features to score, and the peers that score them too."""

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
    """A module of torch-fidelity or clean-fid; a skip without the extra `parity`."""
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
