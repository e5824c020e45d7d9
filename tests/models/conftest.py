"""Directories as diffusers writes them."""

import runpy
import warnings
from pathlib import Path

import pytest

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.fixture(scope="session")
def goldens():
    """The committed directories."""
    return GOLDENS


@pytest.fixture(scope="session", params=["committed", "live"])
def diffusers_answers(request, tmp_path_factory):
    """The committed directories; and where diffusers is installed, new ones."""
    if request.param == "committed":
        return GOLDENS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("diffusers")
        directory = tmp_path_factory.mktemp("live")
        runpy.run_path(str(GOLDENS / "make_diffusers_goldens.py"))["write"](directory, seed=1)
    return directory
