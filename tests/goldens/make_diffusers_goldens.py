"""Writes the kl and unet_* directories beside this file: small networks of diffusers, and what they answer.

Each holds a directory as `save_pretrained` writes it, in half precision, and an `outputs.npz` with inputs and outputs
in float32. Every weight is drawn at random, also where an initialiser has zeros or ones. Needs torch and diffusers:

    python tests/goldens/make_diffusers_goldens.py
"""

from pathlib import Path

import diffusers
import numpy as np
import torch

UNET = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "layers_per_block": 1,
    "sample_size": 8,
}
SD = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 3),
}


def make_models() -> dict[str, diffusers.ModelMixin]:
    """The autoencoder, and the UNet as SD1.5, SD2.1 and SDXL have it (without SDXL's sizes)."""
    unet = diffusers.UNet2DConditionModel
    heads = {"use_linear_projection": True, "attention_head_dim": (2, 4)}
    return {
        "kl": diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            layers_per_block=2,
            scaling_factor=0.5,
            shift_factor=0.25,
        ),
        "unet_sd1": unet(**{**UNET, "layers_per_block": 2}, **SD, attention_head_dim=8),
        "unet_sd2": unet(**UNET, **SD, **heads),
        "unet_sdxl": unet(**UNET, **SDXL, **heads),
    }


def draw_weights(model: diffusers.ModelMixin) -> None:
    """Weights that keep the variance, slopes near 1, biases that matter; all exact in half precision."""
    for name, parameter in model.named_parameters():
        slope = "norm" in name and name.endswith("weight")
        std = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data.normal_(1.0 if slope else 0.0, std)
        parameter.data = parameter.data.half().float()


def draw_inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two examples, not square, the second with less text than the first."""
    shapes = {"images": (2, 16, 24, 3), "latents": (2, 8, 12, 4), "tokens": (2, 7, 12)}
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    mask = np.arange(7)[None] < np.array([[7], [4]])
    return {**inputs, "told": np.array([3, 700], np.float32), "mask": mask}


@torch.no_grad()
def answer(model: diffusers.ModelMixin, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What our networks return, by the names of their methods and inputs."""
    images, latents = (
        torch.from_numpy(np.moveaxis(inputs[name], -1, 1).copy()) for name in ("images", "latents")
    )
    if isinstance(model, diffusers.AutoencoderKL):
        posterior = model.encode(images).latent_dist
        unscaled = latents / model.config.scaling_factor + model.config.shift_factor
        answers = {
            "mean": posterior.mean,
            "logvar": posterior.logvar,
            "decoded": model.decode(unscaled).sample,
        }
    else:
        told, tokens, mask = (torch.from_numpy(inputs[key]) for key in ("told", "tokens", "mask"))
        answers = {
            "unmasked": model(latents, told, tokens).sample,
            "masked": model(latents, told, tokens, encoder_attention_mask=mask).sample,
        }
    return {name: np.moveaxis(value.numpy(), 1, -1) for name, value in answers.items()}


def write(directory: Path, seed: int) -> None:
    """One directory per model."""
    torch.manual_seed(seed)
    inputs = draw_inputs(np.random.default_rng(seed))
    for name, model in make_models().items():
        draw_weights(model)
        answers = answer(model.eval(), inputs)
        model.half().save_pretrained(directory / name, variant="fp16")
        np.savez(directory / name / "outputs.npz", **inputs, **answers)


if __name__ == "__main__":
    write(Path(__file__).parent, seed=0)
