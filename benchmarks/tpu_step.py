"""What a training step costs on a TPU, by the TPU's own compiler, on a machine without one.

    python benchmarks/tpu_step.py --size=unet-sd2 --side=64 --batch=8 [--topology=v5p:2x2x1 --remat=none --show=20]

Compiles the step (bfloat16, AdamW, no average, text embeddings given) for one chip, and prints the memory that it needs
and the time that the compiler expects: its `optimal_seconds`, in which the body of a loop counts once, and the cycles
that it writes beside every instruction, loops by their trips; attention kernels apart. `--show` lists the modules that
cost most. `python -m ldm_jax.plan` does the same for a whole run on a whole slice. Needs jax[tpu]; a step of 866 M
parameters takes minutes to compile.
"""

import argparse
import dataclasses
import itertools
import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from abstract_step import abstract_step
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.models.sizes import backbone
from ldm_jax.parallel import MeshConfig, compiler_options, make_mesh
from ldm_jax.planning.aot import topology
from ldm_jax.planning.cost import cost, profile


def compiled_step(arguments):
    """The program, and the device that it is for."""
    device = topology(arguments.topology)[0]
    mesh = make_mesh(MeshConfig(data=1), [device])
    config = backbone(arguments.size)
    config = dataclasses.replace(config, dtype="bfloat16", remat=arguments.remat)
    whole = NamedSharding(mesh, PartitionSpec())
    step, given = abstract_step(config, arguments.batch, arguments.side, place=whole)
    options = {} if arguments.defaults else compiler_options(mesh)
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=0).lower(*given).compile(options), device


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5p:2x2x1")
    parser.add_argument("--size", default="unet-sd2", help="a name of ldm_jax.models.sizes")
    parser.add_argument("--side", type=int, default=64, help="rows and columns of the latents")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--remat", default="none")
    text = "the compiler's own options, not `parallel.compiler_options`"
    parser.add_argument("--defaults", action="store_true", help=text)
    parser.add_argument("--show", type=int, default=0, help="modules that cost most")
    arguments = parser.parse_args()
    start = time.perf_counter()
    compiled, device = compiled_step(arguments)
    print(f"compiled for {device.device_kind} in {time.perf_counter() - start:.0f} s")
    text = compiled.as_text()
    found = cost(text, compiled.memory_analysis(), [device])
    state, work = found.memory.arguments / 1e9, found.memory.temporaries / 1e9
    print(f"{state:.1f} GB of state and batch, {work:.1f} GB of temporaries")
    print(f"{found.kernel_flops / 1e12:.2f} TFLOP of kernels: {found.kernels * 1e3:.1f} ms")
    optimal = compiled.cost_analysis()["optimal_seconds"]
    for name, rest in (("optimal_seconds", optimal), ("estimated cycles", found.compute)):
        together = (rest + found.kernels) * 1e3
        print(f"{rest * 1e3:.1f} ms of all else by {name}: {together:.1f} ms together")
    shares = profile(text, [device])
    print(", ".join(f"{kind} {1e3 * share:.1f} ms" for kind, share in shares.kinds.items()))
    for module, share in itertools.islice(shares.modules.items(), arguments.show):
        print(f"{share * 1e3:8.2f} ms  {module}")


if __name__ == "__main__":
    main()
