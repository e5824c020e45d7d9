"""Writes inception/ beside this file: what torch-fidelity's Inception-v3 answers and how it resizes.

Its widths are divided by 16 and its weights drawn at random: `shapes.json` has their names and shapes, `draw` their
values, so that they need not be stored. Needs the extra `parity`:

    python tests/goldens/make_inception_goldens.py
"""

import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
import parity

parity.find_packages()

DIVISOR = 16
SIZES = ((299, 299), (75, 80), (20, 91), (7, 5))
FEATURES = {"2048": "pooled", "logits": "logits", "logits_unbiased": "unbiased"}


def draw(shapes: dict[str, list[int]], seed: int) -> dict[str, np.ndarray]:
    """Weights that keep activations near 1. RandomState's numbers never change, as NumPy promises."""
    rng = np.random.RandomState(seed)
    return {key: _drawn(rng, key, shapes[key]) for key in sorted(shapes)}


def _drawn(rng: np.random.RandomState, key: str, shape: list[int]) -> np.ndarray:
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith(("running_var", "bn.weight")):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    std = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.3
    return (std * rng.normal(size=shape)).astype(np.float32)


def draw_pixels(seed: int) -> np.ndarray:
    """Waves of all lengths and directions, whose values are all that a pixel can have, and some noise."""
    rng = np.random.RandomState(seed)
    rows, columns = np.mgrid[:40, :56][..., None] / 40
    speeds, phases = rng.uniform(-12, 12, (2, 3, 1, 1, 3)), rng.uniform(0, 6, (3, 1, 1, 3))
    waves = np.cos(speeds[0] * rows + speeds[1] * columns + phases)
    noisy = 127.5 + 140 * waves + rng.normal(0, 10, waves.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def make_network(divisor: int, seed: int):
    """torch-fidelity's network, all widths but that of the classes divided, with weights as `draw` draws them."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    layers = torch.nn.modules
    narrow = {
        "Conv2d": lambda inputs, outputs, **options: layers.Conv2d(
            inputs if inputs == 3 else inputs // divisor, outputs // divisor, **options
        ),
        "BatchNorm2d": lambda width, **options: layers.BatchNorm2d(width // divisor, **options),
        "Linear": lambda inputs, outputs: layers.Linear(inputs // divisor, outputs),
    }

    class Drawn(FeatureExtractorInceptionV3):
        def load_state_dict(self, _):
            shapes = {key: list(tensor.shape) for key, tensor in self.state_dict().items()}
            drawn = draw(shapes, seed)
            super().load_state_dict({key: torch.from_numpy(drawn[key]) for key in shapes})

    with mock.patch.multiple(torch.nn, **narrow), mock.patch.object(torch, "load"):
        return Drawn("drawn", list(FEATURES), feature_extractor_weights_path="drawn")


def resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """By torch-fidelity's copy of TensorFlow 1's resize_bilinear."""
    import torch
    from torch_fidelity import interpolate_compat_tensorflow as theirs

    images = torch.from_numpy(np.moveaxis(pixels, -1, 1).astype(np.float32))
    answer = theirs.interpolate_bilinear_2d_like_tensorflow1x(images, size, align_corners=False)
    return np.moveaxis(answer.numpy(), 1, -1)


def write(directory: Path, seed: int, divisor: int = DIVISOR) -> None:
    """One directory."""
    import torch

    network, pixels = make_network(divisor, seed), draw_pixels(seed)
    with torch.no_grad():
        answers = network(torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()))
    named = dict(zip(FEATURES.values(), (answer.numpy() for answer in answers), strict=True))
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    directory.mkdir(exist_ok=True)
    (directory / "shapes.json").write_text(json.dumps(shapes, indent=0) + "\n")
    np.savez_compressed(directory / "outputs.npz", pixels=pixels, seed=seed, **named)
    small = {"x".join(map(str, size)): resized(pixels, size)[:1] for size in SIZES[1:]}
    np.savez_compressed(directory / "resized.npz", pixels=pixels[:1], **small)


if __name__ == "__main__":
    write(Path(__file__).parent / "inception", seed=0)
