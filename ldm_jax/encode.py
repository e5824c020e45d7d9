"""Turns images and captions into latents and captions, once, for training to read.

    python -m ldm_jax.encode --config=configs/demo.py --workdir=runs/demo
    python -m ldm_jax.encode --config=configs/photos.py --config.data.source=folder:/photos --workdir=runs/photos

The latents go to WORKDIR/latents (or data.records) with a manifest that lists what was skipped and why, and the config
to WORKDIR, where the other commands find it. Killed at any moment, the same command continues where it stopped.
"""

import argparse

from ldm_jax.runs.config import RunConfig
from ldm_jax.runs.encode import encode
from ldm_jax.runs.run import Run
from ldm_jax.settings.command_line import run_command


def main(flags: argparse.Namespace) -> None:
    """Encodes the training source, and that of the validation loss where it has its own."""
    for line in encode(Run(flags.config, flags.workdir)):
        print(line)


if __name__ == "__main__":
    run_command(main, RunConfig, description=__doc__)
