"""Writes one self-contained HTML page of a run: `python -m ldm_jax.report --workdir=RUN`."""

import argparse

from ldm_jax.files.durable import write_atomically
from ldm_jax.pages.run import page, read_run
from ldm_jax.settings.command_line import any_path, run_command


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    text = "the page; report.html in --workdir by default"
    parser.add_argument("--output", type=any_path, metavar="FILE", help=text)


def main(flags: argparse.Namespace) -> None:
    """Writes the page of the run in `flags.workdir`."""
    output = flags.output or flags.workdir / "report.html"
    text = page(read_run(flags.workdir))
    write_atomically(output, text.encode())
    print(f"{output}: {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main, description=__doc__, add_flags=add_flags)
