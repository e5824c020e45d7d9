"""Scores a trained model, or anybody's images, on prompts: every score with its interval, a table and a page.

    python -m ldm_jax.evaluate --workdir=runs/demo --config.eval.prompts="scenes:simple?count=512&seed=7"
    python -m ldm_jax.evaluate --workdir=runs/demo --samplers=ddim,ddpm --steps=10,20 --guidance=1,3,7.5 --seeds=0,1
    python -m ldm_jax.evaluate --workdir=runs/other --config=configs/photos.py --images=folder:/their/images
    python -m ldm_jax.evaluate --workdir=runs/other --against=runs/demo/evaluated/ddim-20-g3-s0-0123abcd

The first evaluates the newest checkpoint as the run samples; the second every combination of what it names, and several
seeds together, too. The third looks at images with their captions (any source of `data.source`), of data.size pixels;
with --truth also at the images that they should be: PSNR, SSIM, LPIPS. --against tests whether a model is better than
another one, on the same prompts and noise; --over averages runs of several seeds.

Scores are appended to WORKDIR/scores.jsonl with all that they depend on, and shown in WORKDIR/evaluation.html. Killed
at any moment, the same command continues where it stopped; what is finished is not drawn again.
"""

import argparse

from ldm_jax.evals.cells import DIRECTORY
from ldm_jax.parallel import distributed
from ldm_jax.runs.config import RunConfig
from ldm_jax.runs.evaluate import Request, evaluate
from ldm_jax.runs.run import Run, alone_among_runs
from ldm_jax.settings.command_line import run_command
from ldm_jax.settings.values import add_flags_of, from_flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    distributed.add_flags(parser)
    add_flags_of(Request, parser)


def main(flags: argparse.Namespace) -> None:
    """Evaluates, and prints the scores."""
    request = from_flags(Request, flags)
    with distributed.joined(flags), alone_among_runs(flags.workdir / DIRECTORY):
        for number, text in enumerate(evaluate(Run(flags.config, flags.workdir), request)):
            print("\n" * (number > 0) + text)


if __name__ == "__main__":
    run_command(main, RunConfig, description=__doc__, add_flags=add_flags)
