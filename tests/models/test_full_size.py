"""Networks as large as they were released, with random weights, answer as diffusers and transformers do."""

import jax
import numpy as np
import pytest
from specimens import answer, error, opened

from ldm_jax.types import Cond

# The config.json of what was released, as far as it differs from the defaults of diffusers and transformers.
SD_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "sample_size": 64,
}
SD_AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
VIT_L_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
VIT_L_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}
END = 49407  # ends a caption: the highest id

pytestmark = [pytest.mark.full_size, pytest.mark.filterwarnings("ignore")]  # torch's are not ours


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("f")


def draw_weights(model):
    """Weights that keep the variance, also where an initialiser has zeros; slopes near 1, biases that matter."""
    for name, parameter in model.named_parameters():
        slope = "norm" in name and name.endswith("weight")
        std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data.normal_(float(slope), std)


def asked(make, ask, inputs, directory):
    """What `make()`, a model of torch that is then saved in `directory`, answers to NumPy arrays.

    `ask(model, *inputs)` sees the channels of maps second, and so they are in what it returns.
    """
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = make().eval()
    draw_weights(model)
    with torch.inference_mode():
        answers = ask(model, *(torch.from_numpy(channels(x, -1, 1)) for x in inputs))
    model.save_pretrained(directory)
    return [channels(y.numpy(), 1, -1) for y in answers]


def channels(x, source, destination):
    """Maps with their channels moved, and other arrays as they are."""
    return np.moveaxis(x, source, destination).copy() if x.ndim == 4 else x


def test_stable_diffusion_s_unet(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    latents, told, tokens = draw(1, 64, 64, 4), np.array([500], "f"), draw(1, 77, 768)
    (expected,) = asked(
        lambda: diffusers.UNet2DConditionModel(**SD_UNET),
        lambda model, *given: [model(*given).sample],
        (latents, told, tokens),
        tmp_path,
    )
    _, params, apply = opened.__wrapped__(tmp_path)  # which no cache holds
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 859_520_964
    assert error(answer(apply, params, latents, told, Cond(tokens)), expected) < 1e-4


def test_stable_diffusion_s_autoencoder(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    images, latents = draw(1, 128, 128, 3), draw(1, 16, 16, 4)

    def ask(model, images, latents):
        posterior = model.encode(images).latent_dist
        decoded = model.decode(latents / model.config.scaling_factor).sample
        return posterior.mean, posterior.logvar, decoded

    mean, logvar, decoded = asked(
        lambda: diffusers.AutoencoderKL(**SD_AUTOENCODER), ask, (images, latents), tmp_path
    )
    _, params, apply = opened.__wrapped__(tmp_path)
    ours = apply(params, images, method="encode")
    assert error(ours[0], mean) < 1e-4
    assert error(ours[1], logvar) < 1e-4
    assert error(apply(params, latents, method="decode"), decoded) < 1e-4


def test_openai_s_vit_l(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokens = np.random.default_rng(0).integers(0, END, (2, 77))
    tokens[0, 9:] = tokens[1, -1] = END
    images = draw(2, 224, 224, 3)

    def ask(model, tokens, images):
        text, image = model.get_text_features(tokens), model.get_image_features(images)
        return text.pooler_output, image.pooler_output

    config = {"text_config": VIT_L_TEXT, "vision_config": VIT_L_VISION, "projection_dim": 768}
    text, image = asked(
        lambda: transformers.CLIPModel(transformers.CLIPConfig(**config)),
        ask,
        (tokens, images),
        tmp_path,
    )
    _, params, apply = opened.__wrapped__(tmp_path)
    assert error(apply(params, tokens.astype("i"), method="text_features"), text) < 1e-4
    assert error(apply(params, images, method="image_features"), image) < 1e-4
