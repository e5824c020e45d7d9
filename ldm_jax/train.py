"""Trains a text-to-image latent diffusion model on encoded data.

    python -m ldm_jax.train --workdir=runs/demo

Without --config it takes the one that the data was encoded with. WORKDIR gets the config, the checkpoints, metrics
(JSON lines and TensorBoard), and evaluations with samples. Killed at any moment, the same command continues from the
last checkpoint and ends as if nothing had happened.
"""

import argparse

from ldm_jax.parallel import distributed
from ldm_jax.runs.config import RunConfig
from ldm_jax.runs.run import Run, alone_among_runs
from ldm_jax.runs.train import train
from ldm_jax.settings.command_line import run_command
from ldm_jax.training import Stopwatch


def main(flags: argparse.Namespace) -> None:
    """Trains, from scratch or from the last checkpoint in the working directory."""
    watch = Stopwatch("start")
    with distributed.joined(flags), alone_among_runs(flags.workdir):
        train(Run(flags.config, flags.workdir), watch)


if __name__ == "__main__":
    run_command(main, RunConfig, description=__doc__, add_flags=distributed.add_flags)
