"""Draws images from a trained model: one PNG an image and one grid.

    python -m ldm_jax.sample --workdir=runs/demo --prompt="a large red circle at the top left on a gray background"
    python -m ldm_jax.sample --workdir=runs/demo --prompts=prompts.txt --seeds=4 --config.sampling.guidance=3
    python -m ldm_jax.sample --from=/data/stable-diffusion-v1-5 --prompt="a lighthouse at dusk"

The config is the one that the run was started with; settings of `sampling` may be changed. The noise of an image is
a function of its prompt's number and its seed alone.
"""

import argparse
from pathlib import Path

from etils import epath

from ldm_jax.evals.prompts import read_lines
from ldm_jax.runs.config import RunConfig
from ldm_jax.runs.initial import pipeline_config
from ldm_jax.runs.run import Run
from ldm_jax.runs.sample import sample
from ldm_jax.settings.command_line import any_path, in_words, run_command
from ldm_jax.settings.paths import home_path


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    text = "a prompt; may be given several times"
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help=text)
    text = "a text file with a prompt a line"
    parser.add_argument(
        "--prompts", type=in_words(lambda text: Path(home_path(text))), metavar="FILE", help=text
    )
    text = "a pipeline in diffusers' layout to draw from, instead of a run"
    parser.add_argument("--from", dest="source", type=any_path, metavar="DIRECTORY", help=text)
    text = "images of each prompt (default 1)"
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help=text)
    text = "directory of the images (default WORKDIR/images; with --from: images)"
    parser.add_argument("--output", type=any_path, metavar="DIRECTORY", help=text)
    text = "show every step of a batch, which asks the devices to tell the host of it"
    parser.add_argument("--progress", action="store_true", help=text)


def config_of(flags: argparse.Namespace) -> RunConfig | None:
    """Returns the config of the pipeline that --from names."""
    return pipeline_config(flags.source, RunConfig()) if flags.source else None


def main(flags: argparse.Namespace) -> None:
    """Draws and writes the images."""
    prompts = [*flags.prompt, *(read_lines(flags.prompts) if flags.prompts else ())]
    workdir = flags.workdir or epath.Path()
    directory = flags.output or workdir / "images"
    run = Run(flags.config, flags.workdir or flags.source or workdir)
    count = sample(run, prompts, directory, seeds=flags.seeds, progress=flags.progress)
    print(f"{count} images in {directory}, side by side in {directory / 'grid.png'}")


if __name__ == "__main__":
    run_command(main, RunConfig, description=__doc__, add_flags=add_flags, config_of=config_of)
