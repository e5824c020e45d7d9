"""Seconds an image by guided DDIM of 50 steps on this machine's CPU, here and in diffusers on torch.

    python benchmarks/sampling.py [--size=sd1.5 --side=64 --steps=2 --pairs=5 --threads=0] [--whole]
    python benchmarks/sampling.py --text [--size=pixart-alpha --side=32 --threads=0]

Random weights, the same in both, float32, the text's embeddings given, one image, both branches of guidance in one
batch; from noise to latents. The first `--steps` of the 50 are timed, in turns, so that both see the same machine, and
their latents are compared; `--whole` walks all 50 of them, too. diffusers has its own defaults: torch's threads, its
fused attention, the loop of its pipelines. `--threads=1` keeps both on one core and counts its time at work, which what
else runs there disturbs least; on two cores torch's threads wait for each other whenever one of them is taken away.
`--text` times one step of ours with the keys and values of the text kept, as every walk has them, and with the text
prepared anew. Needs the extra `parity`, and 12 GB of memory for SD 1.5.
"""

import argparse
import functools
import os
import statistics
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import torch
from diffusers import DDIMScheduler
from unet_forward import compare, drawn, pair, seconds

from ldm_jax.diffusion import DDIM, Leading, ScaledLinear, denoiser, eps, grid, join, sample
from ldm_jax.models.flops import traced_flops
from ldm_jax.models.networks import make_network
from ldm_jax.models.sizes import backbone
from ldm_jax.types import Cond, Point

STEPS, SCALE = 50, 7.5
# As Stable Diffusion sets it.
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER |= {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}


def samplers(config):
    """Ours and theirs, of the same weights, as functions of noise, embeddings and a number of steps."""
    apply, params, model = pair(config)

    @functools.partial(jax.jit, static_argnums=3)
    def walk(params, noise, texts, steps):
        branches = (apply(params, Cond(text), method="prepare") for text in texts)
        denoise = denoiser(apply, params, join(*branches), prediction=eps, guidance=SCALE)
        points = Point(*(row[: steps + 1] for row in grid(ScaledLinear(), Leading(), STEPS)))
        return sample(denoise, noise, points, jax.random.split(jax.random.key(0), 1), DDIM())

    @torch.inference_mode()
    def theirs(noise, texts, steps):
        scheduler = DDIMScheduler(**SCHEDULER)
        scheduler.set_timesteps(STEPS)
        cond, uncond = map(torch.from_numpy, texts)
        both = torch.cat([uncond, cond])
        x = torch.from_numpy(noise).permute(0, 3, 1, 2).contiguous()
        for t in scheduler.timesteps[:steps]:
            y_u, y_c = model(torch.cat([x, x]), t, both).sample.chunk(2)
            x = scheduler.step(y_u + SCALE * (y_c - y_u), t, x).prev_sample
        return x.permute(0, 2, 3, 1).numpy()

    return functools.partial(walk, params), theirs


def beside_diffusers(config, side, steps, whole, in_turns):
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((1, side, side, config.in_channels), "f")
    texts = rng.standard_normal((2, 1, 77, config.text_width), "f")
    ours, theirs = samplers(config)
    compare(ours(noise, texts, steps), theirs(noise, texts, steps))
    report(in_turns(ours, theirs, (noise, texts, steps)), STEPS / steps)
    if whole:
        compare(ours(noise, texts, STEPS), theirs(noise, texts, STEPS))
        report(in_turns(ours, theirs, (noise, texts, STEPS), repeats=1), 1)


def kept_and_anew(config, side, in_turns):
    """One step of a guided walk, given the text's keys and values, and given the text."""
    init, apply = make_network(config)
    params, rng = jax.device_put(drawn(init)), np.random.default_rng(1)
    x = rng.standard_normal((2, side, side, config.in_channels), "f")
    length = 120 if config.text_width == 4096 else 77
    told, cond = (
        np.full(2, 500, "f"),
        Cond(rng.standard_normal((2, length, config.text_width), "f")),
    )
    prepare = functools.partial(apply, method="prepare")
    anew = lambda params, cond: apply(params, x, told, prepare(params, cond))  # noqa: E731
    share = traced_flops(prepare, params, cond) / traced_flops(anew, params, cond)
    print(f"text takes {share:.1%} of the operations of a step that prepares it")
    given = jax.jit(prepare)(params, cond)
    kept = functools.partial(jax.jit(lambda p, context: apply(p, x, told, context)), params, given)
    anew = functools.partial(jax.jit(anew), params, cond)
    compare(kept(), np.asarray(anew()))
    report(in_turns(kept, anew, ()), STEPS, "kept", "anew")


def take_turns(one, other, given, clock, repeats):
    pairs = []
    for _ in range(repeats):
        pairs.append((seconds(one, given, clock), seconds(other, given, clock)))
        print("{:7.3f} s, {:7.3f} s".format(*pairs[-1]), flush=True)
    return pairs


def report(pairs, factor, one="ours", other="theirs"):
    ratio = statistics.median(first / second for first, second in pairs)
    medians = [statistics.median(times) * factor for times in zip(*pairs, strict=True)]
    print(
        f"an image of {STEPS} steps: {one} {medians[0]:.1f} s, {other} {medians[1]:.1f} s", end=""
    )
    print(f"; {one} takes {ratio:.3f} of the time, the median of pairs")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="sd1.5", help="a UNet of ldm_jax.models.sizes")
    parser.add_argument("--side", type=int, default=64, help="rows and columns of the latents")
    parser.add_argument("--steps", type=int, default=2, help="of the 50, that are timed")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    parser.add_argument("--whole", action="store_true", help="all 50 steps once, too")
    parser.add_argument("--text", action="store_true", help="text kept, against prepared anew")
    arguments = parser.parse_args()
    config, side = backbone(arguments.size), arguments.side
    if arguments.threads:  # before JAX starts its own
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
        torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    in_turns = functools.partial(take_turns, clock=clock, repeats=arguments.pairs)
    if arguments.text:
        kept_and_anew(config, side, in_turns)
    else:
        beside_diffusers(config, side, arguments.steps, arguments.whole, in_turns)


if __name__ == "__main__":
    main()
