"""Writes the kl, unet_* and pixart* directories beside this file: small networks of diffusers, and what they answer.

Each holds a directory as `save_pretrained` writes it, in half precision, and an `outputs.npz` with inputs and outputs
in float32. Every weight is drawn at random, also where an initialiser has zeros or ones. Needs torch and diffusers:

    python tests/goldens/make_diffusers_goldens.py
"""

from collections.abc import Callable
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
TINY = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}
ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 10 + 6 * 4,
}
IF = {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 4,
}


def make_models() -> dict[str, diffusers.ModelMixin]:
    """The autoencoder; the UNet as SD1.5, SD2.1, SDXL and BK-SDM have it, and with DeepFloyd IF's blocks."""
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
        "unet_sdxl": unet(**UNET, **SDXL, **heads, **ADDED),
        "unet_if": unet(**UNET, **IF),
        "unet_tiny": unet(**UNET, **TINY, attention_head_dim=8),
    }


def make_transformers() -> dict[str, diffusers.ModelMixin]:
    """PixArt with the layers from the text to the width, and without them but told the size of the image."""
    pixart = diffusers.PixArtTransformer2DModel
    return {
        "pixart": pixart(
            num_attention_heads=2,
            attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=12,
            num_layers=2,
            sample_size=8,
        ),
        "pixart_sized": pixart(
            num_attention_heads=3,
            attention_head_dim=4,
            cross_attention_dim=12,
            num_layers=1,
            sample_size=16,
            interpolation_scale=2,
            use_additional_conditions=True,
        ),
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
    inputs |= {
        "pooled": rng.normal(size=(2, 10)).astype(np.float32),
        "sizes": rng.integers(0, 1024, (2, 6)).astype(np.float32),
    }
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
        told, tokens, mask, pooled, sizes = (
            torch.from_numpy(inputs[key]) for key in ("told", "tokens", "mask", "pooled", "sizes")
        )
        given, added = (latents, told, tokens), {"text_embeds": pooled, "time_ids": sizes}
        answers = {
            "unmasked": model(*given, added_cond_kwargs=added).sample,
            "masked": model(*given, encoder_attention_mask=mask, added_cond_kwargs=added).sample,
        }
    return {name: np.moveaxis(value.numpy(), 1, -1) for name, value in answers.items()}


@torch.no_grad()
def answer_transformer(
    model: diffusers.PixArtTransformer2DModel, inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What our transformer returns: theirs, without the channels that the latents do not have."""
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    resolution = given["sizes"][:, 4:]
    added = {"resolution": resolution, "aspect_ratio": resolution[:, :1] / resolution[:, 1:]}
    arguments = (given["latents"].permute(0, 3, 1, 2), given["tokens"], given["told"], added)
    answers = {
        "unmasked": model(*arguments).sample,
        "masked": model(*arguments, encoder_attention_mask=given["mask"]).sample,
    }
    return {name: value.permute(0, 2, 3, 1).numpy()[..., :4] for name, value in answers.items()}


def write_model(
    directory: Path, model: diffusers.ModelMixin, inputs: dict[str, np.ndarray], answer: Callable
) -> None:
    """The directory of one model, its weights drawn anew."""
    draw_weights(model)
    answers = answer(model.eval(), inputs)
    model.half().save_pretrained(directory, variant="fp16")
    np.savez(directory / "outputs.npz", **inputs, **answers)


def write(directory: Path, seed: int) -> None:
    """One directory per model."""
    torch.manual_seed(seed)
    inputs = draw_inputs(np.random.default_rng(seed))
    for name, model in make_models().items():
        write_model(directory / name, model, inputs, answer)
    torch.manual_seed(seed)
    seen = {name: inputs[name] for name in ("tokens", "mask", "sizes", "told")}
    seen["latents"] = np.ascontiguousarray(inputs["latents"][:, :, :6])
    for name, model in make_transformers().items():
        write_model(directory / name, model, seen, answer_transformer)


if __name__ == "__main__":
    write(Path(__file__).parent, seed=0)
