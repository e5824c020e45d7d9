"""Scores a trained model on its prompts: samples, every score with its interval, and the validation loss.

    python -m ldm_jax.evaluate --workdir=runs/demo --config.sampling.guidance=3 --config.sampling.steps=20
    python -m ldm_jax.evaluate --workdir=runs/demo --config.eval.prompts="scenes:simple?count=512&seed=7"

The scores are printed as a table and appended to WORKDIR/scores.jsonl with the settings they were had with.
"""

import argparse
import json

from etils import epath

from ldm_jax import build
from ldm_jax.config import RunConfig
from ldm_jax.configuration import to_json
from ldm_jax.evals.image_grids import save_grid
from ldm_jax.flags import run_command
from ldm_jax.parallel import distributed, make_mesh
from ldm_jax.pretrained import load_pretrained
from ldm_jax.scaling.records import append_line
from ldm_jax.types import Estimate


def main(flags: argparse.Namespace) -> None:
    """Evaluates the newest checkpoint."""
    with distributed.joined(flags):
        run(flags.config, flags.workdir)


def run(config: RunConfig, workdir: epath.Path) -> None:
    """Draws, scores, and says what came of it; of several processes the first one says it."""
    mesh = make_mesh(config.mesh)
    pretrained = load_pretrained(config, mesh)
    network = build.make_backbone(config, pretrained)
    examples, params = build.load_weights(config, workdir, network, pretrained, mesh)
    prompts = build.make_prompts(config, workdir)
    evaluator = build.make_evaluator(config, prompts, network, pretrained, mesh)
    validate = build.make_validation(config, workdir, network, pretrained, mesh)
    evaluation = evaluator(params, pretrained.params, config.sampling.guidance)
    losses = validate(params, pretrained.params)
    if not distributed.is_first():
        return
    picture = workdir / "samples" / "evaluated.png"
    save_grid(picture, evaluation.images[: config.eval.shown])
    line = {
        "examples": examples,
        "scores": evaluation.scores,
        "validation": losses,
        "config": json.loads(to_json(config)),
    }
    append_line(workdir / "scores.jsonl", line)
    print(table(evaluation.scores, losses))
    print(f"{len(prompts.texts)} prompts, {examples} examples of training; samples in {picture}")


def table(scores: dict[str, Estimate], losses: dict[str, float]) -> str:
    """One score a line, with its 95% interval and the number of prompts behind it."""
    rows = [
        f"{name:<28} {score.value:8.4f}   [{score.low:.4f}, {score.high:.4f}]   n={score.count}"
        for name, score in scores.items()
    ]
    rows += [f"{f'validation loss at {level}':<28} {loss:8.4f}" for level, loss in losses.items()]
    return "\n".join(rows)


if __name__ == "__main__":
    run_command(main, RunConfig, description=__doc__, add_flags=distributed.add_flags)
