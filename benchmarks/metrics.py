"""Images a second through the networks that score, on this machine's CPU, here and in their peers on torch.

    python benchmarks/metrics.py [--network=clip-b/32 --batch=16 --repeats=9 --threads=0]

CLIP's image features beside transformers', from pixels that are resized and normalised; Inception's beside
torch-fidelity's, from images of 256 pixels that both resize. Random weights, the same in both, at real widths, float32.
The two take turns, so that both see the same machine; their answers are compared first. `--threads=1` keeps both on one
core and counts its time at work, which what else runs there disturbs least. Needs the extra `parity`.

Measured with `--threads=1` on a shared machine, images a second here and in the peer, and our part of its time:

    clip-b/32             22.0   10.9    0.50
    clip-l/14 --batch=4    1.02   0.57   0.55
    inception             12.8    8.3    0.64

Its processor is AMD's, on which the products of matrices in torch's MKL reach 99 GFLOP/s and XLA's 217: all of what
CLIP gains. Inception gains because one CPU takes images one by one, which their maps' memory is kept for.
"""

import argparse
import functools
import os
import runpy
import statistics
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import torch
import transformers

from ldm_jax.metrics.resize import as_torch_fidelity, to_images
from ldm_jax.models import weights
from ldm_jax.models.inception import InceptionConfig
from ldm_jax.models.networks import described, make_network

GOLDENS = Path(__file__).resolve().parents[1] / "tests" / "goldens"
TOLERANCE = 1e-4  # of the largest value
SIZE = 256  # pixels a side of the images that Inception is given
VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}


def shapes(config):
    return jax.eval_shape(make_network(config).init, jax.random.key(0))


def clip(batch, **vision):
    """Ours and theirs as functions of NumPy arrays that return one, each with what it is given."""
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision)).eval()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        kind, config = described(Path(directory))
        params = weights.load(directory, shapes(config), kind.names(config))
    ours = jax.jit(functools.partial(make_network(config).apply, method="image_features"))

    @torch.inference_mode()
    def theirs(pixels):
        return model.get_image_features(torch.from_numpy(pixels)).pooler_output.numpy()

    images = np.random.default_rng(0).normal(size=(batch, 224, 224, 3)).astype("f")
    return (functools.partial(ours, params), images), (theirs, channels_first(images))


def inception(batch):
    """As `clip`."""
    script = runpy.run_path(str(GOLDENS / "make_inception_goldens.py"))  # finds torch-fidelity
    model, config = script["make_network"](divisor=1, seed=0).eval(), InceptionConfig()
    tensors = ((key, tensor.numpy()) for key, tensor in model.state_dict().items())
    params = weights.fitted(tensors, shapes(config), config.names, where="torch-fidelity")
    params = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)), params)

    @jax.jit
    def ours(params, pixels):
        return make_network(config).apply(params, as_torch_fidelity(to_images(pixels))).pooled

    @torch.inference_mode()
    def theirs(pixels):
        return model(torch.from_numpy(pixels))[0].numpy()

    images = np.random.default_rng(0).integers(0, 256, (batch, SIZE, SIZE, 3), "uint8")
    return (functools.partial(ours, params), images), (theirs, channels_first(images))


NETWORKS = {
    "clip-b/32": clip,
    "clip-l/14": functools.partial(clip, **VIT_L),
    "inception": inception,
}


def channels_first(images):
    return np.moveaxis(images, -1, 1).copy()


def compare(ours, theirs):
    """Ends the program if the answers differ."""
    answer, expected = (np.asarray(function(given)) for function, given in (ours, theirs))
    error = np.max(np.abs(answer - expected)) / np.max(np.abs(expected))
    print(f"the answers differ by {error:.1e} of the largest value")
    if not error <= TOLERANCE:
        raise SystemExit(f"that is more than {TOLERANCE}")


def seconds(clock, function, given):
    start = clock()
    np.asarray(function(given))
    return clock() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="clip-b/32", choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    if arguments.threads:  # before JAX starts its own
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
        torch.set_num_threads(arguments.threads)
    ours, theirs = NETWORKS[arguments.network](arguments.batch)
    compare(ours, theirs)
    pairs = []
    for _ in range(arguments.repeats):
        pairs.append((seconds(clock, *ours), seconds(clock, *theirs)))
        print("ours {:6.3f} s, theirs {:6.3f} s".format(*pairs[-1]), flush=True)
    rates = [arguments.batch / statistics.median(times) for times in zip(*pairs, strict=True)]
    ratio = statistics.median(mine / other for mine, other in pairs)
    print("images a second: ours {:.2f}, theirs {:.2f}".format(*rates), end="; ")
    print(f"ours take {ratio:.2f} of the time, the median of pairs")


if __name__ == "__main__":
    main()
