"""Draws images from a trained model: one PNG an image and one grid.

    python -m ldm_jax.sample --workdir=runs/demo --prompt="a large red circle at the top left on a gray background"
    python -m ldm_jax.sample --workdir=runs/demo --prompts=prompts.txt --seeds=4 --steps=20 --guidance=3

The config is the one that the run was started with; settings of `sampling` may be changed. The noise of an image is a
function of its prompt's number and its seed alone.
"""

import argparse
from pathlib import Path

from ldm_jax.diffusion import SAMPLERS
from ldm_jax.evals.prompts import read_lines
from ldm_jax.runs.config import RunConfig
from ldm_jax.runs.evaluate import samplings
from ldm_jax.runs.run import Run
from ldm_jax.runs.sample import sample
from ldm_jax.settings.command_line import any_path, run_command


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    text = "a prompt; may be given several times"
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help=text)
    text = "a text file with a prompt a line"
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=text)
    text = "images of each prompt (default 1)"
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help=text)
    text = "rule of a step (default: the run's)"
    parser.add_argument("--sampler", choices=tuple(SAMPLERS), help=text)
    text = "number of sampling steps (default: the run's)"
    parser.add_argument("--steps", type=int, metavar="N", help=text)
    text = "scale of guidance (default: the run's)"
    parser.add_argument("--guidance", type=float, metavar="X", help=text)
    text = "directory of the images (default WORKDIR/images)"
    parser.add_argument("--output", type=any_path, metavar="DIRECTORY", help=text)
    text = "show every step of a batch, which asks the devices to tell the host of it"
    parser.add_argument("--progress", action="store_true", help=text)


def main(flags: argparse.Namespace) -> None:
    """Draws and writes the images."""
    prompts = [*flags.prompt, *(read_lines(flags.prompts) if flags.prompts else ())]
    directory = flags.output or flags.workdir / "images"
    names, steps, scales = (
        [x] * (x is not None) for x in (flags.sampler, flags.steps, flags.guidance)
    )
    (sampling,) = samplings(flags.config.sampling, names, steps, scales)
    run = Run(flags.config, flags.workdir).sampled_by(sampling)
    count = sample(run, prompts, directory, seeds=flags.seeds, progress=flags.progress)
    print(f"{count} images in {directory}, side by side in {directory / 'grid.png'}")


if __name__ == "__main__":
    run_command(main, RunConfig, description=__doc__, add_flags=add_flags)
