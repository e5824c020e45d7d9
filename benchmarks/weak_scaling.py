"""How much longer a training step gets on more chips, by the TPU's own compiler, on a machine without one.

    python benchmarks/weak_scaling.py --config=configs/text_to_image.py:pixart-alpha \
        --config.data.text_embeddings=true [--rows=8 --topologies=v5p:2x2x1,v5p:2x2x4,v5p:4x4x4,v5p:4x8x8]

Every chip has the same number of images (`--rows`) and all parameters. Times are those of `python -m ldm_jax.plan`.
Needs jax[tpu]. A transformer compiles in about two minutes for each topology, a UNet of 866 M parameters in ten.
"""

import dataclasses

import jax

from ldm_jax.planning import programs
from ldm_jax.planning.aot import topology
from ldm_jax.runs.config import RunConfig
from ldm_jax.settings.command_line import run_command

TOPOLOGIES = "v5p:2x2x1,v5p:2x2x4,v5p:4x4x4,v5p:4x8x8"
HEADER = (
    "topology   chips  ms/step  longer  sent MB  communication ms  exposed  share  images/s a chip"
)


def add_flags(parser):
    parser.add_argument("--topologies", default=TOPOLOGIES, help="from few chips to many")
    parser.add_argument("--rows", type=int, default=8, help="images a chip")


def main(flags):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    print(HEADER)
    first = None
    for name in flags.topologies.split(","):
        devices = topology(name)
        train = dataclasses.replace(flags.config.train, batch=flags.rows * len(devices))
        config = dataclasses.replace(flags.config, train=train)
        run = programs.Planned(config, devices=devices)
        cost = programs.compiled(programs.training(run)).cost
        first = first or cost.seconds
        sent = sum(each.times * each.ici_bytes for each in cost.collectives) / 1e6
        print(
            f"{name:10} {len(devices):5} {cost.seconds * 1e3:8.1f} {cost.seconds / first - 1:+7.1%} {sent:8.0f}"
            f" {cost.ici * 1e3:17.1f} {cost.exposed * 1e3:8.1f} {cost.exposed / cost.seconds:6.1%}"
            f" {flags.rows / cost.seconds:16.1f}",
            flush=True,
        )


if __name__ == "__main__":
    run_command(main, RunConfig, description=__doc__, add_flags=add_flags, in_workdir=False)
