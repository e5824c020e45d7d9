"""Finds the packages of `parity.txt`, which lie beside the environment's own.

Three of them import torchvision, of which registries have the build for GPUs alone. Beside torch for CPUs it lacks its
operators, and wherever it is seen so it breaks the import of diffusers and transformers too. So `make` installs these
packages into a directory of their own, without what they depend on, and only who calls `find_packages` sees them.
"""

import contextlib
import importlib.util
import sys
import warnings
from pathlib import Path

DIRECTORY = Path(sys.prefix) / "parity"
OPERATORS = ("nms", "qnms")  # those without which torchvision cannot be imported
_kept = []  # operators go with the object that declared them


def find_packages() -> None:
    """Makes the packages importable, if they are installed. To be called before diffusers and transformers are."""
    if DIRECTORY.is_dir() and str(DIRECTORY) not in sys.path:
        sys.path.append(str(DIRECTORY))
    package = importlib.util.find_spec("torchvision")
    if package:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _declare_operators(Path(package.origin).parent)


def _declare_operators(torchvision: Path) -> None:
    import torch

    with contextlib.suppress(OSError):  # what it is built for is not there
        torch.ops.load_library(torchvision / "_C.so")
    if not hasattr(torch.ops.torchvision, OPERATORS[0]):
        library = torch.library.Library("torchvision", "DEF")
        for name in OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        _kept.append(library)
