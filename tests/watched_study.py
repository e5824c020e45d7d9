"""A small study as a command, for tests of several processes: `python tests/watched_study.py --workdir=...`."""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "studies"))

from test_study import GRID

from ldm_jax.parallel import distributed
from ldm_jax.settings.command_line import run_command
from ldm_jax.studies import engine

SMALL = dataclasses.replace(GRID, steps=(2,), others={"ddpm": (2,)}, seeds=(0,))


def main(flags: argparse.Namespace) -> None:
    """Runs it."""
    with distributed.joined(flags):
        engine.run(SMALL, flags.workdir)


if __name__ == "__main__":
    run_command(main, description=__doc__, add_flags=distributed.add_flags)
