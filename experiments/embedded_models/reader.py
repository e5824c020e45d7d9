"""The reader of scenes: a network that answers the questions of `ldm_jax.evals.faithfulness`.

It learns from renders and from reconstructions by the autoencoder, both blurred, faded and noisy at random, so
that it reads what is drawn and not how crisply.
"""

from pathlib import Path
from typing import Any

import autoencoder
import jax
import jax.numpy as jnp
import numpy as np
import optax
from data import HELD_OUT, TRAINING, batches, draw, images
from optimise import optimise

from ldm_jax.data.scenes import KINDS, Scene
from ldm_jax.evals.faithfulness import (
    HEADS,
    OF_A_KIND,
    OUTPUTS,
    SLICES,
    UNASKED,
    faithfulness,
    questions,
    targets,
)
from ldm_jax.models import names, weights
from ldm_jax.models.reader import Reader, ReaderConfig
from ldm_jax.nn.functional import functional
from ldm_jax.types import Params

CONFIG = ReaderConfig(asked=((len(KINDS), OF_A_KIND), (1, OUTPUTS - len(KINDS) * OF_A_KIND)))
BATCH, LEARNING_RATE = 32, 2e-3
RECONSTRUCTED = (
    16_384  # scenes that are seen through the autoencoder once, and drawn from ever after
)


def attribute_loss(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of every head `[B, OUTPUTS]` that has an answer, and the share answered rightly."""
    losses, right = [], []
    for number, head in enumerate(HEADS):
        row, label = logits[:, SLICES[head]], labels[:, number]
        losses.append(optax.softmax_cross_entropy_with_integer_labels(row, jnp.maximum(label, 0)))
        right.append(jnp.argmax(row, -1) == label)
    asked = (labels != UNASKED).T
    return tuple(jnp.sum(jnp.stack(x) * asked) / jnp.sum(asked) for x in (losses, right))


def train(assets: Path, steps: int) -> None:
    """Trains the reader into `assets`, with the autoencoder that is there."""
    init, apply = functional(lambda rngs: Reader(CONFIG, rngs))
    reconstruct, frozen = autoencoder.load(assets)
    reconstruct = jax.jit(reconstruct)
    pool = draw(range(RECONSTRUCTED), seed=TRAINING)
    seen = np.concatenate(
        [reconstruct(frozen, images(pool[i : i + 64])) for i in range(0, len(pool), 64)]
    )
    rng = np.random.default_rng(0)

    def prepare(scenes: list[Scene]) -> dict[str, np.ndarray]:
        # As many reconstructions as renders, in turn, so that a batch divides over devices.
        chosen = rng.integers(len(pool), size=len(scenes))
        labels = [
            targets(s) for i, scene in zip(chosen, scenes, strict=True) for s in (scene, pool[i])
        ]
        both = np.stack([images(scenes), seen[chosen]], 1)
        return {"images": both.reshape(-1, *both.shape[2:]), "labels": np.stack(labels)}

    def loss(params: Params, batch: dict[str, Any], key: jax.Array) -> tuple[jax.Array, dict]:
        logits = apply(params, _disturb(batch["images"], key))
        value, accuracy = attribute_loss(logits, batch["labels"])
        return value, {"loss": value, "accuracy": accuracy}

    def save(params: Params) -> None:
        weights.save(assets / "reader", params, names.Names(), CONFIG.to_dict(), dtype="float16")

    data = batches(prepare, BATCH)
    params = jax.jit(init)(jax.random.key(0))
    optimise("reader", loss, params, data, save, steps=steps, learning_rate=LEARNING_RATE)


def _disturb(x: jax.Array, key: jax.Array) -> jax.Array:
    """Mixes every image with a blurred one, scales its contrast and adds noise, all by a random amount."""
    blur, gain, level, noise = jax.random.split(key, 4)
    each = (len(x), 1, 1, 1)
    soft = jax.image.resize(jax.image.resize(x, (len(x), 32, 32, 3), "linear"), x.shape, "linear")
    x = x + 0.5 * jax.random.uniform(blur, each) * (soft - x)
    x = x * jax.random.uniform(gain, each, minval=0.85, maxval=1.1)
    return x + 0.1 * jax.random.uniform(level, each) * jax.random.normal(noise, x.shape)


def measure(assets: Path, count: int = 1000) -> dict[str, float]:
    """Faithfulness of held-out renders, of their reconstructions and of noise, for either preset."""
    config = ReaderConfig.from_dict(weights.read_config(directory := assets / "reader"))
    init, apply = functional(lambda rngs: Reader(config, rngs))
    params = weights.load(directory, jax.eval_shape(init, jax.random.key(0)), names.Names())
    reconstruct, frozen = autoencoder.load(assets)
    read = jax.jit(apply)
    figures = {}
    for preset in ("simple", "full"):
        scenes = draw(range(count), seed=HELD_OUT, preset=preset)
        asked = [questions(scene, number) for number, scene in enumerate(scenes)]
        pictures = images(scenes)
        shown = {
            "renders": pictures,
            "reconstructions": np.concatenate(
                [jax.jit(reconstruct)(frozen, x) for x in np.split(pictures, count // 50)]
            ),
            "noise": np.random.default_rng(0)
            .normal(size=pictures.shape)
            .astype(np.float32)
            .clip(-1, 1),
        }
        for name, x in shown.items():
            logits = np.concatenate([read(params, part) for part in np.split(x, count // 50)])
            scores = faithfulness(logits, asked)
            figures[f"faithfulness of {name}, {preset} scenes"] = scores["faithfulness"].value
    return figures
