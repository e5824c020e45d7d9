"""Writes dinov2/ beside this file: small networks of transformers with either feed-forward part, and what they answer.

Each holds a directory as `save_pretrained` writes it and an `outputs.npz` with images of several sizes and their class
tokens. Every weight is drawn at random, also where an initialiser has zeros or ones. Needs torch and transformers:

    python tests/goldens/make_dinov2_goldens.py
"""

from pathlib import Path

import numpy as np
import torch
import transformers

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 20,
    "patch_size": 4,
    "mlp_ratio": 2,
}
FORMS = {
    "mlp": {"layerscale_value": 0.5},
    "swiglu": {"use_swiglu_ffn": True, "qkv_bias": False, "layer_norm_eps": 1e-3},
}
SIZES = {"trained": (20, 20), "smaller": (9, 9), "larger": (32, 32), "oblong": (12, 28)}


def draw_weights(model: transformers.Dinov2Model) -> None:
    """Normal weights: of mean 1 for the slopes of layer norms, large enough that softmax is not flat."""
    for name, parameter in model.named_parameters():
        slope = "norm" in name and name.endswith("weight")
        summed = parameter[0].numel() if parameter.ndim in (2, 4) else 25
        std = 1.5 * summed**-0.5
        parameter.data.normal_(1.0 if slope else 0.0, std)


@torch.no_grad()
def answer(model: transformers.Dinov2Model, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Images of every size, and their class tokens after the last norm."""
    answers = {}
    for name, size in SIZES.items():
        images = rng.normal(size=(2, *size, 3)).astype(np.float32)
        pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        answers[f"{name}_images"] = images
        answers[f"{name}_features"] = model(pixels).pooler_output.numpy()
    return answers


def write(directory: Path, seed: int, **options: int) -> None:
    """One directory per form; `options` replace those of SMALL."""
    torch.manual_seed(seed)
    for name, form in FORMS.items():
        model = transformers.Dinov2Model(transformers.Dinov2Config(**{**SMALL, **options, **form}))
        draw_weights(model)
        model.eval().save_pretrained(directory / name)
        outputs = answer(model, np.random.default_rng(seed))
        np.savez(directory / name / "outputs.npz", **outputs)


if __name__ == "__main__":
    write(Path(__file__).parent / "dinov2", seed=0)
