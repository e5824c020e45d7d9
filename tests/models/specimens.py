"""Small networks for tests: with weights drawn at random, or opened from a directory; and what to give them."""

import dataclasses
import functools

import jax
import numpy as np

from ldm_jax.models import weights
from ldm_jax.models.names import STACK
from ldm_jax.models.networks import described, make_network
from ldm_jax.models.pixart_config import PixArtConfig
from ldm_jax.models.unet_config import DEEPFLOYD, UNetConfig
from ldm_jax.models.uvit_config import UViTConfig
from ldm_jax.types import Cond

UNET = UNetConfig(
    channels=(16, 32),
    transformer_depth=(0, 2),
    mid_depth=2,
    num_res_blocks=1,
    head_width=8,
    text_width=24,
    num_groups=4,
    sample_size=8,
)
PIXART = PixArtConfig(width=24, depth=2, num_heads=2, text_width=20, sample_size=8)

# Every backbone by its name in the registry, conditioned by all that it can be; then in its other forms.
SMALL = {
    "unet": dataclasses.replace(UNET, pooled_width=10, size_width=4),
    "pixart": dataclasses.replace(PIXART, size_conditioning=True),
    "uvit": UViTConfig(width=16, depth=4, num_heads=2, text_width=20, text_length=9, sample_size=8),
    "unet without sizes": UNET,
    "unet without a middle": dataclasses.replace(
        UNET, transformer_depth=(1, 0), mid_depth=0, use_linear_projection=False
    ),
    "unet without a middle block": dataclasses.replace(
        UNET, transformer_depth=(1, 1), mid_depth=None, use_linear_projection=False
    ),
    "unet of IF's blocks": dataclasses.replace(
        UNET, blocks=DEEPFLOYD, transformer_depth=(1, 1), mid_depth=1
    ),
    "pixart without sizes": PIXART,
    "pixart without a caption MLP": dataclasses.replace(PIXART, text_width=24, caption_mlp=False),
}


def shapes(config):
    """Its parameters as ShapeDtypeStructs."""
    return jax.eval_shape(make_network(config).init, jax.random.key(0))


def num_params(config):
    """How many numbers it learns."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(config)))


@functools.cache
def jitted(config):
    """Its `apply`, compiled once for all tests of a file."""
    return jax.jit(make_network(config).apply, static_argnames="method")


@functools.cache
def drawn(config):
    """Parameters that are all drawn at random, also where an initialiser has zeros or ones; and the jitted `apply`."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        stacked = STACK in (key.key for key in path)
        summed = leaf.shape[stacked:-1]
        std = np.prod(summed) ** -0.5 if summed else 0.3
        return (std * rng.normal(size=leaf.shape)).astype("f")

    return jax.tree_util.tree_map_with_path(draw, shapes(config)), jitted(config)


@functools.cache
def opened(directory):
    """The config, the parameters and the jitted `apply` of the network in a directory."""
    kind, config = described(directory)
    return config, weights.load(directory, shapes(config), kind.names(config)), jitted(config)


def outputs_of(directory):
    """What a committed directory was asked, and what it answered."""
    with np.load(directory / "outputs.npz") as file:
        return dict(file)


def inputs(config):
    """Of three examples: latents that are not square, times, and prompts of which the first is seen whole."""
    rng = np.random.default_rng(1)

    def draw(*shape):
        return rng.normal(size=(3, *shape)).astype("f")

    x, tokens = draw(4, 6, config.in_channels), draw(5, config.text_width)
    mask = np.arange(5)[None] < np.array([[5], [3], [1]])
    sizes = rng.uniform(20, 600, size=(3, 6)).astype("f")
    return (
        x,
        np.linspace(0, 900, 3, dtype="f"),
        Cond(tokens, mask, draw(config.pooled_width), sizes),
    )


def answer(apply, params, x, told, cond):
    """What a backbone predicts."""
    return apply(params, x, told, apply(params, cond, method="prepare"))


def error(ours, theirs):
    """The largest difference, relative to the largest value."""
    return np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
