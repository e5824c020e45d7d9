"""The training step that benchmarks compile: of shapes alone, no array is made."""

import functools

import jax
import jax.numpy as jnp

from ldm_jax.diffusion import ScaledLinear, eps, make_loss
from ldm_jax.models.networks import make_network
from ldm_jax.training import OptimizerConfig, abstract_state, make_optimizer, make_step
from ldm_jax.types import Batch, Cond


def abstract_step(config, rows, side=None, *, ema=0, place=None):
    """`step`, and what it is called with: AdamW, noise prediction, embeddings of 77 tokens.

    `ema` is the half-life of the average in examples, `place` a sharding for all arrays.
    """
    network = make_network(config)
    prepare = functools.partial(network.apply, method="prepare")
    loss = make_loss(network.apply, prepare, schedule=ScaledLinear(), prediction=eps)
    tx = make_optimizer(OptimizerConfig(), batch_size=rows, examples=10**9)
    step = make_step(loss, tx, jax.random.key(0), ema=ema)
    shape, side = (
        functools.partial(jax.ShapeDtypeStruct, sharding=place),
        side or config.sample_size,
    )
    places = None if place is None else lambda tree: jax.tree.map(lambda _: place, tree)
    state = abstract_state(network.init, tx, places, ema=bool(ema))
    batch = Batch(
        latents=shape((rows, side, side, config.in_channels), jnp.float32),
        cond=Cond(shape((rows, 77, config.text_width), config.dtype)),
        weight=shape((rows,), jnp.float32),
        index=shape((rows,), jnp.uint32),
    )
    return step, (state, {}, batch)
