"""Is a smaller model the better one at equal cost of sampling? Trains a family, samples it in a grid, and answers.

    python experiments/sampling_efficiency/study.py --workdir=runs/efficiency
    python experiments/sampling_efficiency/study.py --workdir=runs/overnight --scale=overnight
    python experiments/sampling_efficiency/study.py --scale=paper --topology=v5e:16x16
    python experiments/sampling_efficiency/study.py --draw=experiments/sampling_efficiency

The first trains five models on scenes and samples them, in half an hour on two cores; killed at any moment, the same
command continues. The second takes the whole grid of section A.4 and longer training. The third says what the grid of
"Bigger is not Always Better" (arXiv:2404.01367) comes to on a slice. `--draw` makes the figures and the page again from
DIRECTORY/records.jsonl, next to it; the first two end with that.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from etils import epath

from ldm_jax.parallel import distributed
from ldm_jax.runs.config import EvalConfig, RunConfig, SamplingConfig
from ldm_jax.settings.command_line import UsageError, any_path, load_config, run_command
from ldm_jax.settings.schema import from_config_dict
from ldm_jax.studies import engine
from ldm_jax.studies.sampling import SamplingStudy, plan

sys.path.insert(0, str(Path(__file__).parent))

import figures

NAME = "sampling_efficiency"
CONFIGS = Path(__file__).parents[2] / "configs"
# Channels of the first level by name, the width of a head beside them.
FAMILY = {"78k": (8, 8), "284k": (16, 8), "617k": (24, 12), "1.1M": (32, 16), "2.4M": (48, 24)}
PAPER = ("39m", "83m", "145m", "223m", "318m", "430m", "558m", "704m", "866m", "2b", "5b")
PAPER_SCORES = ("fid", "clip_score_x100")
RATES = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)  # A.4
STEPS = (4, 6, 8, 10, 20, 50)  # A.4


def scenes() -> SamplingStudy:
    """The default: half an hour on two cores."""
    return of_scenes(
        examples=96_000,
        prompts=64,
        steps=(1, 2, 4, 8, 16),
        guidance=(1.0, 2.0, 4.0, 7.5),
        seeds=(0, 1),
        others=dict.fromkeys(("ddpm", "dpmpp", "heun"), (2, 4, 8, 16)),
    )


def overnight() -> SamplingStudy:
    """The whole grid of A.4 on scenes, and fewer steps; four times the prompts, twice the training and the seeds."""
    few = (2, 4, 6, 8, 10, 20)
    others = {"ddpm": STEPS, "dpmpp": few, "heun": few}
    return of_scenes(
        examples=192_000,
        prompts=256,
        steps=(1, 2, *STEPS),
        guidance=RATES,
        seeds=(0, 1, 2, 3),
        others=others,
    )


def paper() -> SamplingStudy:
    """A's own: its family, 30 000 captions of COCO, A.4's rates, A.5's costs up to 200, A.6's samplers."""
    return SamplingStudy(
        name=NAME,
        models={name.upper(): of_paper(name) for name in PAPER},
        baseline="866M",
        sampler="ddim",
        others={"ddpm": STEPS, "dpmpp": tuple(steps for steps in STEPS if steps <= 20)},
        steps=(*STEPS, 100, 250, 500),
        guidance=RATES,
        seeds=(0,),
        scores=PAPER_SCORES,
        prompts=30_000,
        cost=200,
    )


SCALES = {"scenes": scenes, "overnight": overnight, "paper": paper}


def of_scenes(*, examples, prompts, steps, guidance, seeds, others) -> SamplingStudy:
    """A study of the family on one object a scene, with the embedded models."""
    scores = ("faithfulness", "clip_score", "kid_clip")
    models = {
        name: of_width(channels, head, examples, prompts, scores, steps[-1])
        for name, (channels, head) in FAMILY.items()
    }
    return SamplingStudy(
        name=NAME,
        models=models,
        baseline=next(reversed(FAMILY)),
        sampler="ddim",
        others=others,
        steps=steps,
        guidance=guidance,
        seeds=seeds,
        scores=scores,
        prompts=prompts,
    )


def of_width(channels, head, examples, prompts, scores, steps) -> RunConfig:
    """The demo's training of one size, evaluated on the study's own prompts."""
    config = loaded("demo.py")
    widths = {"channels": (channels, 2 * channels), "head_width": head}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, validation=None),
        backbone=dataclasses.replace(config.backbone, **widths),
        train=dataclasses.replace(config.train, examples=examples, save_every=16_000),
        sampling=SamplingConfig(steps=steps, guidance=4.0, batch=64),
        eval=EvalConfig(
            every=examples,
            prompts=f"scenes:simple?count={prompts}",
            reference=config.eval.reference,
            validation=0,
            metrics=scores,
        ),
    )


def of_paper(name: str) -> RunConfig:
    """A.2's training of one size, as the config of the papers' backbones has it, on A's prompts."""
    config = loaded(f"text_to_image.py:unet-{name}")
    prompts = "coco:annotations/captions_val2014.json?count=30000"
    measured = dataclasses.replace(config.eval, prompts=prompts, metrics=PAPER_SCORES)
    return dataclasses.replace(config, eval=measured)


def loaded(name: str) -> RunConfig:
    """A config of the project."""
    return from_config_dict(load_config(str(CONFIGS / name)), RunConfig)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    text = "directory of the study; it continues there"
    parser.add_argument("--workdir", type=any_path, metavar="DIRECTORY", help=text)
    text = "how large: scenes (default), overnight, paper (planned only)"
    parser.add_argument("--scale", choices=tuple(SCALES), default="scenes", help=text)
    text = "plan the scale for this slice instead of running it, such as v5e:16x16"
    parser.add_argument("--topology", metavar="KIND:AxB", help=text)
    text = "share of the chips' peak that a plan counts on (default 0.4)"
    parser.add_argument("--mfu", type=float, default=0.4, metavar="SHARE", help=text)
    text = "draw the figures of DIRECTORY/records.jsonl again"
    parser.add_argument("--draw", type=any_path, metavar="DIRECTORY", help=text)
    text = "of records of several grids or commits, those of this grid (default: the newest)"
    parser.add_argument("--grid", default="", metavar="DIGEST", help=text)
    parser.add_argument("--commit", default="", metavar="COMMIT", help="and of this commit")
    distributed.add_flags(parser)


def main(flags: argparse.Namespace) -> None:
    """Plans, runs, draws."""
    chosen = [flag for flag in ("topology", "draw", "workdir") if getattr(flags, flag)]
    if len(chosen) != 1:
        raise UsageError("give one of --workdir=DIRECTORY, --topology=KIND:AxB, --draw=DIRECTORY")
    if flags.topology:
        print(*plan(SCALES[flags.scale](), flags.topology, flags.mfu), sep="\n")
        return
    if flags.draw:
        draw(flags.draw, flags.grid, flags.commit)
        return
    if flags.scale == "paper":
        raise UsageError(
            "--scale=paper is planned, with --topology=KIND:AxB; its data is not public"
        )
    with distributed.joined(flags):
        records = engine.run(SCALES[flags.scale](), flags.workdir)
        if distributed.is_first():
            draw(flags.workdir, records[0].grid, records[0].commit)


def draw(directory: epath.Path, grid: str, commit: str) -> None:
    """Writes the figures and the page, and says the verdicts."""
    for line in figures.draw(directory, directory / engine.LEDGER, grid, commit):
        print(line)


if __name__ == "__main__":
    run_command(main, description=__doc__, add_flags=add_flags, in_workdir=False)
