"""The tokenizer and the text encoder that condition the diffusion models.

This encoder is not the tower that scores: it never saw an image, nor a caption with a held-out pair of kind and
colour. It learns to tell a scene's graph from any of its captions, by linear heads that are thrown away.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from data import HELD_OUT, batches, draw
from flax import nnx
from optimise import optimise
from reader import attribute_loss

from ldm_jax.data.scenes import Scene, captions
from ldm_jax.evals.faithfulness import HEADS, OUTPUTS, SLICES, UNASKED, targets
from ldm_jax.models import names, weights
from ldm_jax.models.clip import CLIPText, CLIPTextConfig
from ldm_jax.models.tokenizer import Tokenizer, train_tokenizer
from ldm_jax.nn.functional import functional
from ldm_jax.types import Params, Tokens

VOCABULARY, LENGTH = 768, 64
BATCH, LEARNING_RATE = 64, 2e-3


class Graph(nnx.Module):
    """A text tower and the heads of the graph on its pooled output."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs) -> None:
        self.text_model = CLIPText(config, rngs)
        self.heads = nnx.Linear(config.hidden_size, OUTPUTS, rngs=rngs)

    def __call__(self, tokens: Tokens) -> jax.Array:
        return self.heads(self.text_model(tokens).pooled)


def tower(tokenizer: Tokenizer) -> CLIPTextConfig:
    """The text tower that the encoder and the scoring CLIP have in common; their weights differ."""
    return CLIPTextConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=LENGTH,
        bos_token_id=int(tokenizer([""])[0, 0]),
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )


def describe(scenes: list[Scene], tokenizer: Tokenizer, first: int = 0) -> np.ndarray:
    """Tokens of one caption of each scene, their kinds in turn."""
    return tokenizer(
        [(texts := captions(scene))[(first + i) % len(texts)] for i, scene in enumerate(scenes)]
    )


def train(assets: Path, steps: int) -> None:
    """Trains the tokenizer and the encoder into `assets`."""
    texts = [text for scene in draw(range(4000), seed=HELD_OUT + 1) for text in captions(scene)]
    train_tokenizer(texts, VOCABULARY, LENGTH, assets / "tokenizer")
    tokenizer = Tokenizer.from_directory(assets / "tokenizer")
    config = tower(tokenizer)
    init, apply = functional(lambda rngs: Graph(config, rngs))

    def prepare(scenes: list[Scene]) -> dict[str, np.ndarray]:
        return {
            "tokens": describe(scenes, tokenizer),
            "labels": np.stack([targets(s) for s in scenes]),
        }

    def loss(params: Params, batch: dict[str, Any], key: jax.Array) -> tuple[jax.Array, dict]:
        value, accuracy = attribute_loss(apply(params, batch["tokens"]), batch["labels"])
        return value, {"loss": value, "accuracy": accuracy}

    def save(params: Params) -> None:
        directory, encoder = assets / "text_encoder", params["text_model"]
        weights.save(directory, encoder, names.CLIP_TEXT, config.to_transformers(), dtype="float16")

    data = batches(prepare, BATCH, split="train")
    params = jax.jit(init)(jax.random.key(0))
    optimise("text_encoder", loss, params, data, save, steps=steps, learning_rate=LEARNING_RATE)


def measure(assets: Path, count: int = 4000) -> dict[str, float]:
    """How much of a graph a linear probe tells from the end token of its dense caption, held-out pairs apart."""
    tokenizer = Tokenizer.from_directory(assets / "tokenizer")
    config = CLIPTextConfig.from_transformers(
        weights.read_config(directory := assets / "text_encoder")
    )
    init, apply = functional(lambda rngs: CLIPText(config, rngs))
    params = weights.load(directory, jax.eval_shape(init, jax.random.key(0)), names.CLIP_TEXT)
    encode = jax.jit(lambda tokens: apply(params, tokens).pooled)

    def told(split: str, first: int) -> tuple[np.ndarray, np.ndarray]:
        scenes = draw(range(first, first + count), seed=HELD_OUT, split=split)
        pooled = np.asarray(encode(tokenizer([captions(scene)[0] for scene in scenes])))
        return np.pad(pooled, ((0, 0), (0, 1)), constant_values=1), np.stack(
            [targets(s) for s in scenes]
        )

    features, labels = told("train", 0)
    probes = {}
    for number, head in enumerate(HEADS):
        asked = labels[:, number] != UNASKED
        wanted = np.eye(SLICES[head].stop - SLICES[head].start)[labels[asked, number]]
        probes[number] = np.linalg.lstsq(features[asked], wanted, rcond=None)[0]
    figures = {}
    for split in ("train", "held_out"):
        features, labels = told(split, count)
        right = [
            np.argmax(features @ probe, 1)[asked] == labels[asked, number]
            for number, probe in probes.items()
            if (asked := labels[:, number] != UNASKED).any()
        ]
        figures[f"attributes told by a linear probe, {split} split"] = float(
            np.concatenate(right).mean()
        )
    return figures
