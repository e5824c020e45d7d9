"""A forward pass of a whole UNet on this machine's CPU, here and in diffusers on torch.

    python benchmarks/unet_forward.py [--size=sd1.5 --side=64 --batch=1 --repeats=7]

Random weights, float32, 77 tokens of text, the keys and values of the text computed anew. diffusers reads the weights
that we write, and has its own defaults: torch's threads, its fused attention. The two take turns, so that both see the
same machine; their answers are compared first. Needs diffusers, 12 GB of memory and twice the weights' room on disk.
"""

import argparse
import functools
import os
import statistics
import tempfile
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import torch
from diffusers import UNet2DConditionModel

from ldm_jax.models import weights
from ldm_jax.models.sizes import backbone
from ldm_jax.models.unet import UNet
from ldm_jax.nn.functional import functional
from ldm_jax.types import Cond

TOLERANCE = 1e-4  # of the largest value


def drawn(init, seed=0):
    """Parameters drawn at random, also where `init` has zeros; slopes of norms near one."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        slope = path[-1].key == "scale"
        std = 0.3 if slope or path[-1].key == "bias" else np.prod(leaf.shape[:-1]) ** -0.5
        return np.float32(slope) + np.float32(std) * rng.standard_normal(leaf.shape, "f")

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, jax.random.key(0)))


def pair(config):
    """Our `apply` and its parameters, and their model of the same weights."""
    init, apply = functional(lambda rngs: UNet(config, rngs))
    params = drawn(init)
    with tempfile.TemporaryDirectory() as directory:
        weights.save(directory, params, config.names, config.to_diffusers())
        model = UNet2DConditionModel.from_pretrained(directory).eval()
    return apply, jax.device_put(params), model


def networks(config):
    """Ours and theirs, of the same weights, as functions of NumPy arrays that return one."""
    apply, params, model = pair(config)

    @jax.jit
    def predict(params, latents, told, tokens):
        context = apply(params, Cond(tokens), method="prepare")
        return apply(params, latents, told, context)

    @torch.inference_mode()
    def theirs(latents, told, tokens):
        latents, told, tokens = map(torch.from_numpy, (latents, told, tokens))
        sample = model(latents.permute(0, 3, 1, 2).contiguous(), told, tokens).sample
        return sample.permute(0, 2, 3, 1).numpy()

    return functools.partial(predict, params), theirs


def compare(answer, expected):
    """Ends the program if the answers differ."""
    error = np.max(np.abs(np.asarray(answer) - expected)) / np.max(np.abs(expected))
    print(f"the answers differ by {error:.1e} of the largest value", flush=True)
    if not error <= TOLERANCE:
        raise SystemExit(f"that is more than {TOLERANCE}")


def seconds(function, given, clock=time.perf_counter):
    start = clock()
    np.asarray(function(*given))
    return clock() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="sd1.5", help="a UNet of ldm_jax.models.sizes")
    parser.add_argument("--side", type=int, default=64, help="rows and columns of the latents")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    config, rows, side = backbone(arguments.size), arguments.batch, arguments.side
    rng = np.random.default_rng(1)
    given = (
        rng.standard_normal((rows, side, side, config.in_channels), "f"),
        np.linspace(0, 999, rows, dtype="f"),
        rng.standard_normal((rows, 77, config.text_width), "f"),
    )
    ours, theirs = networks(config)
    compare(ours(*given), theirs(*given))
    pairs = []
    for _ in range(arguments.repeats):
        pairs.append((seconds(ours, given), seconds(theirs, given)))
        print("ours {:6.3f} s, theirs {:6.3f} s".format(*pairs[-1]), flush=True)
    mine, other = map(statistics.median, zip(*pairs, strict=True))
    print(f"medians: ours {mine:.3f} s, theirs {other:.3f} s, ratio {mine / other:.2f}")


if __name__ == "__main__":
    main()
