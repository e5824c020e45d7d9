"""The CLIP that scores: trained contrastively on images and captions, apart from the text encoder that conditions.

Beside the captions of the other scenes, each image is set against its own caption with one attribute swapped
(Yuksekgonul et al. 2023, arXiv 2210.01936); heads that tell the graph, thrown away after, speed the start.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from data import HELD_OUT, batches, draw, images, swapped
from flax import nnx
from optimise import optimise
from reader import attribute_loss
from text_encoder import describe, tower

from ldm_jax.data.scenes import Scene, captions
from ldm_jax.evals.faithfulness import OUTPUTS, targets
from ldm_jax.models import names, weights
from ldm_jax.models.clip import CLIP, CLIPConfig, CLIPVisionConfig, preprocess, unit_norm
from ldm_jax.models.tokenizer import Tokenizer
from ldm_jax.nn.functional import functional
from ldm_jax.types import Images, Params, Tokens

BATCH, LEARNING_RATE = 64, 2e-3
VISION = CLIPVisionConfig(
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=64,
    patch_size=8,
)


class Trained(nnx.Module):
    """CLIP and the heads of the graph on both of its pooled outputs."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs) -> None:
        self.clip = CLIP(config, rngs)
        self.image_heads = nnx.Linear(config.vision.hidden_size, OUTPUTS, rngs=rngs)
        self.text_heads = nnx.Linear(config.text.hidden_size, OUTPUTS, rngs=rngs)

    def __call__(self, images: Images, tokens: Tokens) -> dict[str, jax.Array]:
        image = self.clip.vision_model(preprocess(images, VISION.image_size)).pooled
        text = self.clip.text_model(tokens).pooled
        return {
            "image": unit_norm(self.clip.visual_projection(image)),
            "text": unit_norm(self.clip.text_projection(text)),
            "image_graph": self.image_heads(image),
            "text_graph": self.text_heads(text),
            "scale": jnp.exp(jnp.minimum(self.clip.logit_scale[...], jnp.log(100.0))),
        }


def train(assets: Path, steps: int) -> None:
    """Trains CLIP into `assets`, over the tokenizer that is there."""
    tokenizer = Tokenizer.from_directory(assets / "tokenizer")
    config = CLIPConfig(text=tower(tokenizer), vision=VISION, projection_dim=64)
    init, apply = functional(lambda rngs: Trained(config, rngs))

    def prepare(scenes: list[Scene]) -> dict[str, np.ndarray]:
        # Rows come in pairs of a caption and its swapped twin, so that a batch divides over devices.
        first = int(scenes[0].things[0].x * 1e3)
        others = [swapped(scene, first + number) for number, scene in enumerate(scenes)]
        tokens = [describe(of, tokenizer, first) for of in (scenes, others)]
        return {
            "images": images(scenes),
            "tokens": np.stack(tokens, 1),
            "labels": np.stack([targets(s) for s in scenes]),
        }

    def loss(params: Params, batch: dict[str, Any], key: jax.Array) -> tuple[jax.Array, dict]:
        tokens = jnp.moveaxis(batch["tokens"], 1, 0).reshape(2 * BATCH, -1)
        out = apply(params, batch["images"], tokens)
        own = jnp.arange(BATCH)
        # A terse caption does not name what was swapped: then there is no twin to tell apart.
        same = jnp.all(tokens[:BATCH] == tokens[BATCH:], axis=1)
        logits = out["scale"] * out["image"] @ out["text"].T
        logits = logits.at[own, own + BATCH].add(jnp.where(same, -1e9, 0.0))
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        to_text = cross_entropy(logits, own).mean()
        to_image = cross_entropy(logits[:, :BATCH].T, own).mean()
        twins = jnp.stack([jnp.diagonal(logits, offset) for offset in (0, BATCH)], 1)
        swap = cross_entropy(twins, jnp.zeros_like(own)).mean()
        seen, _ = attribute_loss(out["image_graph"], batch["labels"])
        told, _ = attribute_loss(out["text_graph"][:BATCH], batch["labels"])
        value = to_text + to_image + swap + seen + told
        return value, {
            "contrastive": (to_text + to_image) / 2,
            "found": jnp.mean(jnp.argmax(logits[:, :BATCH], 1) == own),
            "preferred": jnp.mean(twins[:, 0] > twins[:, 1]),
            "seen": seen,
            "told": told,
        }

    def save(params: Params) -> None:
        weights.save(
            assets / "clip", params["clip"], names.CLIP, config.to_transformers(), dtype="float16"
        )

    shutil.copytree(assets / "tokenizer", assets / "clip", dirs_exist_ok=True)
    data = batches(prepare, BATCH, presets=("simple", "full"))
    params = jax.jit(init)(jax.random.key(0))
    optimise("clip", loss, params, data, save, steps=steps, learning_rate=LEARNING_RATE)


def measure(assets: Path, groups: int = 20) -> dict[str, float]:
    """Retrieval of the dense caption among 100 scenes, and how often it is preferred to a swapped one."""
    tokenizer = Tokenizer.from_directory(assets / "tokenizer")
    config = CLIPConfig.from_transformers(weights.read_config(assets / "clip"))
    init, apply = functional(lambda rngs: CLIP(config, rngs))
    params = weights.load(assets / "clip", jax.eval_shape(init, jax.random.key(0)), names.CLIP)

    @jax.jit
    def cosines(pictures: Images, tokens: Tokens) -> jax.Array:
        image = apply(params, preprocess(pictures, VISION.image_size), method="image_features")
        text = apply(params, tokens, method="text_features")
        return unit_norm(image) @ unit_norm(text).T

    figures = {}
    for preset in ("simple", "full"):
        found, preferred = [], []
        for group in range(groups):
            drawn = draw(range(1000 * group, 1000 * (group + 1)), seed=HELD_OUT, preset=preset)
            scenes = list({captions(scene)[0]: scene for scene in drawn}.values())[:100]
            others = [swapped(scene, number) for number, scene in enumerate(scenes)]
            tokens = [tokenizer([captions(s)[0] for s in of]) for of in (scenes, others)]
            own, twin = (np.asarray(cosines(images(scenes), t)) for t in tokens)
            found.append(own.argmax(1) == np.arange(100))
            preferred.append(own.diagonal() > twin.diagonal())
        figures[f"dense caption found among 100 {preset} scenes"] = float(np.mean(found))
        figures[f"dense caption preferred to a swapped one, {preset} scenes"] = float(
            np.mean(preferred)
        )
    return figures
