"""Writes the clip_* directories beside this file: small networks of transformers, and what they answer.

Each holds a directory as `save_pretrained` writes it and an `outputs.npz` with inputs and outputs. Every weight is
drawn at random, also where an initialiser has zeros or ones. Needs torch and transformers:

    python tests/goldens/make_clip_goldens.py
"""

from pathlib import Path

import numpy as np
import torch
import transformers

LAYERS = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16}
TEXT = {
    **LAYERS,
    "intermediate_size": 24,
    "vocab_size": 42,
    "max_position_embeddings": 9,
    "projection_dim": 12,
    "bos_token_id": 38,
    "eos_token_id": 39,
    "pad_token_id": 39,
}
VISION = {
    **LAYERS,
    "intermediate_size": 40,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 12,
}


def make_models() -> dict[str, transformers.PreTrainedModel]:
    """Every class that we mirror, and between them both activations and both rules for the end token."""
    text, vision = transformers.CLIPTextConfig, transformers.CLIPVisionConfig
    both = transformers.CLIPConfig(
        text_config={**TEXT, "num_hidden_layers": 2}, vision_config=VISION, projection_dim=10
    )
    projected_text = text(**{**TEXT, "pad_token_id": 0}, hidden_act="gelu")
    return {
        "clip_text": transformers.CLIPTextModel(text(**{**TEXT, "eos_token_id": 2})),
        "clip_text_projected": transformers.CLIPTextModelWithProjection(projected_text),
        "clip_vision": transformers.CLIPVisionModel(vision(**VISION)),
        "clip_vision_projected": transformers.CLIPVisionModelWithProjection(
            vision(**VISION, hidden_act="gelu")
        ),
        "clip_both": transformers.CLIPModel(both),
    }


def draw_weights(model: transformers.PreTrainedModel) -> None:
    """Normal weights: of mean 1 for the slopes of layer norms, large enough that softmax is not flat."""
    for name, parameter in model.named_parameters():
        slope = "norm" in name and name.endswith("weight")
        parameter.data.normal_(1.0 if slope else 0.0, 0.3)


def draw_inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Captions of several lengths, padded with the end token, and images."""
    tokens = rng.integers(1, 38, (4, 9))
    tokens[:, 0] = 38
    for row, length in zip(tokens, (1, 3, 6, 8), strict=True):
        row[length:] = 39
    tokens[3, 2] = 41  # a word with an id above that of the end token: the two rules differ
    images = rng.normal(size=(4, 8, 8, 3))
    return {"tokens": tokens.astype(np.int32), "images": images.astype(np.float32)}


@torch.no_grad()
def answer(model: transformers.PreTrainedModel, inputs: dict[str, np.ndarray]) -> dict:
    """What our modules return, by the names of their fields."""
    tokens = torch.from_numpy(inputs["tokens"]).long()
    images = torch.from_numpy(np.moveaxis(inputs["images"], -1, 1))
    kind = type(model).__name__
    if kind == "CLIPModel":
        answers = {
            "text_features": model.get_text_features(tokens).pooler_output,
            "image_features": model.get_image_features(images).pooler_output,
            "logits": model(tokens, images).logits_per_image,
        }
    else:
        outputs = model(tokens if "Text" in kind else images, output_hidden_states=True)
        answers = {"last": outputs.last_hidden_state, "penultimate": outputs.hidden_states[-2]}
        for name in ("text_embeds", "image_embeds"):
            if name in outputs:
                answers["projected"] = outputs[name]
        if "pooler_output" in outputs:
            answers["pooled"] = outputs.pooler_output
        if "Vision" in kind:
            del answers["penultimate"]
    return {name: value.numpy() for name, value in answers.items()}


def write(directory: Path, seed: int) -> None:
    """One directory per model."""
    torch.manual_seed(seed)
    inputs = draw_inputs(np.random.default_rng(seed))
    for name, model in make_models().items():
        draw_weights(model)
        model.eval().save_pretrained(directory / name)
        np.savez(directory / name / "outputs.npz", **inputs, **answer(model, inputs))


if __name__ == "__main__":
    write(Path(__file__).parent, seed=0)
