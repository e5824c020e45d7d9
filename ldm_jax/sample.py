"""Draws images from a trained model: one PNG an image and one grid.

    python -m ldm_jax.sample --workdir=runs/demo --prompt="a large red circle at the top left on a gray background"
    python -m ldm_jax.sample --workdir=runs/demo --prompts=prompts.txt --seeds=4 --steps=20 --guidance=3
    python -m ldm_jax.sample --from=/data/stable-diffusion-v1-5 --prompt="a lighthouse at dusk"

The config is the one that the run was started with; settings of `sampling` may be changed. The noise of an image is a
function of its prompt's number and its seed alone.
"""

import argparse

from etils import epath

from ldm_jax.runs.config import RunConfig
from ldm_jax.runs.initial import pipeline_config
from ldm_jax.runs.run import Run
from ldm_jax.runs.sample import Request, sample
from ldm_jax.settings.command_line import any_path, run_command
from ldm_jax.settings.values import add_flags_of, from_flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    add_flags_of(Request, parser)
    text = "a pipeline in diffusers' layout to draw from, instead of a run"
    parser.add_argument("--from", dest="source", type=any_path, metavar="DIRECTORY", help=text)
    text = "directory of the images (default WORKDIR/images; with --from: images)"
    parser.add_argument("--output", type=any_path, metavar="DIRECTORY", help=text)


def config_of(flags: argparse.Namespace) -> RunConfig | None:
    """Returns the config of the pipeline that --from names."""
    return pipeline_config(flags.source, RunConfig()) if flags.source else None


def main(flags: argparse.Namespace) -> None:
    """Draws and writes the images."""
    workdir = flags.workdir or epath.Path()
    directory = flags.output or workdir / "images"
    run = Run(flags.config, flags.workdir or flags.source or workdir)
    count = sample(run, from_flags(Request, flags), directory)
    print(f"{count} images in {directory}, side by side in {directory / 'grid.png'}")


if __name__ == "__main__":
    run_command(main, RunConfig, description=__doc__, add_flags=add_flags, config_of=config_of)
