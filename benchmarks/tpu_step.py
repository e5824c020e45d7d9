"""What a training step costs on a TPU, by the TPU's own compiler, on a machine without one.

    python benchmarks/tpu_step.py --size=unet-sd2 --side=64 --batch=8 [--topology=v5p:2x2x1 --remat=none --show=20]

Compiles the step (bfloat16, AdamW, no average, text embeddings given) for one chip, and prints the memory that it needs
and the time that the compiler expects: its `optimal_seconds`, in which the body of a loop counts once, and the cycles
that it writes beside every instruction, loops by their trips. Of the attention kernels it knows nothing: their
products, with what they compute again, are taken to run at 40% of the chip's peak. `--show` lists what costs most.
Needs jax[tpu]; a step of 866 M parameters takes minutes to compile.
"""

import argparse
import collections
import dataclasses
import math
import os
import re
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from abstract_step import abstract_step
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.models.sizes import backbone
from ldm_jax.parallel import MeshConfig, compiler_options, make_mesh
from ldm_jax.parallel.aot import instructions, topology
from ldm_jax.parallel.mesh import peak_flops

CLOCK = 1.75e9  # cycles a second of a v5p
REACHED = 0.4  # of the peak, by the kernels
PRODUCTS = {
    "fwd": 2,
    "dkv": 5,
}  # of matrices in a kernel; its backward pass repeats one of the forward pass


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


def kernel_flops(instruction):
    """Floating-point operations of one run of an attention kernel."""
    operands = instruction.text.partition("operand_layout_constraints=")[2]
    shapes = [dims.split(",") for dims in re.findall(r"bf16\[([\d,]+)\]", operands)]
    (batch, heads, *q), (*_, rows, columns) = (map(int, shape) for shape in shapes[:2])
    width, queries = sorted(q)  # either may lie innermost, and there are more tokens than channels
    (products,) = (n for name, n in PRODUCTS.items() if f"splash_mha_{name}" in instruction.text)
    return products * 2 * batch * heads * queries * max(rows, columns) * width


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5p:2x2x1")
    parser.add_argument("--size", default="unet-sd2", help="a name of ldm_jax.models.sizes")
    parser.add_argument("--side", type=int, default=64, help="rows and columns of the latents")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--remat", default="none")
    text = "the compiler's own options, not `parallel.compiler_options`"
    parser.add_argument("--defaults", action="store_true", help=text)
    parser.add_argument("--show", type=int, default=0, help="lines of what costs most")
    arguments = parser.parse_args()
    start = time.perf_counter()
    compiled, device = compiled_step(arguments)
    print(f"compiled for {device.device_kind} in {time.perf_counter() - start:.0f} s")
    memory = compiled.memory_analysis()
    state, work = memory.argument_size_in_bytes / 1e9, memory.temp_size_in_bytes / 1e9
    print(f"{state:.1f} GB of state and batch, {work:.1f} GB of temporaries")
    lines = list(instructions(compiled.as_text()))
    kernels = [line for line in lines if "tpu_custom_call" in line.text]
    seconds = sum(line.cycles * line.times for line in lines) / CLOCK
    optimal = compiled.cost_analysis()["optimal_seconds"]
    flops = math.fsum(line.times * kernel_flops(line) for line in kernels)
    attention = flops / (REACHED * peak_flops(device.device_kind))
    print(f"{flops / 1e12:.2f} TFLOP of kernels: {attention * 1e3:.1f} ms")
    for name, rest in (("optimal_seconds", optimal), ("estimated cycles", seconds)):
        together = (rest + attention) * 1e3
        print(f"{rest * 1e3:.1f} ms of all else by {name}: {together:.1f} ms together")
    shares = collections.Counter()
    for line in lines:
        shares[line.operation] += line.cycles * line.times / CLOCK
    print(", ".join(f"{name} {share * 1e3:.1f} ms" for name, share in shares.most_common(6)))
    for line in sorted(lines, key=lambda line: -line.cycles * line.times)[: arguments.show]:
        cost = line.cycles * line.times / CLOCK * 1e3
        print(f"{cost:8.2f} ms {line.times:4d}x {line.operation:12} {line.scope[-70:]}")


if __name__ == "__main__":
    main()
