"""What a run costs on TPUs, before one is rented; on any machine, by the TPUs' own compiler.

    python -m ldm_jax.plan --config=configs/text_to_image.py:unet-866m --topology=v5p:4x4x8 --price=4.20
    python -m ldm_jax.plan --config=configs/text_to_image.py:unet-5b --topology=v5e:16x16 --search
    python -m ldm_jax.plan --table

The first compiles the training step and the sampling program of the run for that slice, or several, and reports their
memory, their time with what of it communication takes, and what the whole run comes to. `--search` looks for the
layout: mesh, parts of a batch, recomputation. `--program=encoding` plans what makes the latents instead, `--profile`
says where the time goes. A compilation takes minutes; that of a UNet of 866 M parameters ten, of one of 5 B, or with
its parameters in parts, hours. `--memory` ends it before there is code, after a few minutes of any: what a chip holds
and sends is then the compiler's, and the time a roofline's. Needs jax[tpu]. For both kinds of time see docs/plans.

`--table` prints every backbone of `ldm_jax.models.sizes`: its parameters and the cost of a forward pass for one image,
counted layer by layer, beside what its paper prints of them. The cost is in the paper's unit at its size of latents:
A's GFLOPs have two for every multiply-add, also between queries, keys and values; B's GMACs are without these.
"""

import argparse

from ldm_jax.planning.report import Request, report
from ldm_jax.runs.config import RunConfig
from ldm_jax.settings.command_line import run_command
from ldm_jax.settings.values import add_flags_of, from_flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    add_flags_of(Request, parser)


def main(flags: argparse.Namespace) -> None:
    """Prints the table, the plan, or the layouts that were found."""
    for line in report(flags.config, from_flags(Request, flags)):
        print(line, flush=True)


if __name__ == "__main__":
    run_command(main, RunConfig, description=__doc__, add_flags=add_flags, in_workdir=False)
