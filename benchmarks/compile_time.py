"""How long a training step takes to compile on this machine's CPU, and what twice the depth adds to that.

    python benchmarks/compile_time.py [--size=pixart-alpha --repeats=5]

The step (AdamW, an average of the parameters, text embeddings given) of a transformer as deep as it is and twice as
deep, of the same width. The two take turns, without a compilation cache; no parameter is made.
"""

import argparse
import dataclasses
import os
import statistics
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from abstract_step import abstract_step

from ldm_jax.models.sizes import backbone


def seconds(config):
    """Of tracing and lowering a training step, and of compiling it."""
    step, given = abstract_step(config, rows=8, ema=10**6)
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(*given)
    between = time.perf_counter()
    lowered.compile()
    return between - start, time.perf_counter() - between


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="pixart-alpha", help="one of ldm_jax.models.sizes")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    config = backbone(arguments.size)
    configs = [config, dataclasses.replace(config, depth=2 * config.depth)]
    seconds(config)  # the first of all pays for what a process does once
    runs = [[seconds(config) for config in configs] for _ in range(arguments.repeats)]
    medians = []
    for config, costs in zip(configs, zip(*runs, strict=True), strict=True):
        medians.append(statistics.median(map(sum, costs)))
        lower, compiling = map(statistics.median, zip(*costs, strict=True))
        print(
            f"{config.depth} blocks: {medians[-1]:.2f} s, lowered in {lower:.2f}, compiled in {compiling:.2f}"
        )
    print(f"twice the depth takes {medians[1] / medians[0]:.2f} of the time")


if __name__ == "__main__":
    main()
