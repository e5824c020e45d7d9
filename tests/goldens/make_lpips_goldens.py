"""Writes lpips/ beside this file: narrow networks of the lpips package, and the distances that they measure.

Each holds a config as ours is written, the package's `state_dict` as safetensors, and an `outputs.npz` with pairs of
images and their distances. Every weight is drawn at random. Needs the extra `parity`:

    python tests/goldens/make_lpips_goldens.py
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parents[1]))
import parity

parity.find_packages()
import lpips  # noqa: E402

DIVISORS = {"alex": 16, "vgg": 32}  # of the widths
SIZE = (33, 37)


def narrow(model: lpips.LPIPS, divisor: int) -> None:
    """Replaces every convolution by one with so many times fewer channels, but for the image's and the distance's."""
    for parent in list(model.modules()):
        for name, old in parent.named_children():
            if isinstance(old, torch.nn.Conv2d):
                inputs, outputs = (
                    width if width in (1, 3) else width // divisor
                    for width in (old.in_channels, old.out_channels)
                )
                options = {"stride": old.stride, "padding": old.padding}
                options["bias"] = old.bias is not None
                setattr(parent, name, torch.nn.Conv2d(inputs, outputs, old.kernel_size, **options))


def draw_weights(model: lpips.LPIPS) -> None:
    """Normal weights that keep the variance of what goes through them; positive ones for the distances."""
    for name, parameter in model.named_parameters():
        if name.startswith("lin"):
            parameter.data.uniform_(0, 1)
        else:
            std = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.data.normal_(0.0, std)


@torch.no_grad()
def answer(model: lpips.LPIPS, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Pairs of images that differ much and little, and their distances."""
    first = rng.uniform(-1, 1, (2, *SIZE, 3))
    amount = np.array([1, 0.03])[:, None, None, None]
    second = (1 - amount) * first + amount * rng.uniform(-1, 1, first.shape)
    pair = [images.astype(np.float32) for images in (first, second)]
    pixels = [torch.from_numpy(np.moveaxis(images, -1, 1).copy()) for images in pair]
    distances = model(*pixels)[:, 0, 0, 0].numpy()
    return {"images": pair[0], "others": pair[1], "distances": distances}


def write(directory: Path, seed: int, divisors: Mapping[str, int] = DIVISORS) -> None:
    """One directory per trunk."""
    torch.manual_seed(seed)
    for net, divisor in divisors.items():
        model = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
        narrow(model, divisor)
        draw_weights(model)
        model.eval()
        (directory / net).mkdir(parents=True, exist_ok=True)
        config = {"_class_name": "LPIPS", "version": "0.1", "net": net, "divisor": divisor}
        (directory / net / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        save_file(tensors, directory / net / "diffusion_pytorch_model.safetensors")
        outputs = answer(model, np.random.default_rng(seed))
        np.savez(directory / net / "outputs.npz", **outputs)


if __name__ == "__main__":
    write(Path(__file__).parent / "lpips", seed=0)
