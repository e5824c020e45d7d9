"""Trains a text-to-image latent diffusion model on encoded data.

    python -m ldm_jax.train --workdir=runs/demo

Without --config it takes the one that the data was encoded with. WORKDIR gets the config, the checkpoints, metrics
(JSON lines and TensorBoard), and evaluations with samples. Killed at any moment, the same command continues from the
last checkpoint and ends as if nothing had happened.
"""

import argparse
import contextlib
import functools
import json
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from ldm_jax import build
from ldm_jax.config import CHECKPOINTS, RunConfig, claim
from ldm_jax.configuration import to_json
from ldm_jax.data.durable import alone_in
from ldm_jax.data.scenes import render
from ldm_jax.evals import METRICS
from ldm_jax.evals.evaluator import Evaluator
from ldm_jax.evals.features import Features
from ldm_jax.evals.journal import Journal
from ldm_jax.evals.prompts import Prompts
from ldm_jax.flags import run_command
from ldm_jax.metrics.resize import to_images
from ldm_jax.models.flops import count
from ldm_jax.models.text import warn_of_truncation
from ldm_jax.nn.functional import Functional
from ldm_jax.parallel import distributed, make_mesh
from ldm_jax.pretrained import Pretrained, load_pretrained
from ldm_jax.scaling.records import RunRecord, append_line, append_record, commit, read_lines
from ldm_jax.scoring import Scoring, make_reference, make_scoring
from ldm_jax.training import Every, Hook, State, Stopwatch, Tick, fit, jit_step, prefetch
from ldm_jax.training.checkpoints import Checkpoints
from ldm_jax.training.hooks import Guard, Metrics, Profiler, Progress, tensorboard
from ldm_jax.training.loop import tolerated
from ldm_jax.training.saving import Preemption, Save
from ldm_jax.types import Estimate, Params, Pixels


def main(flags: argparse.Namespace) -> None:
    """Trains, from scratch or from the last checkpoint in the working directory."""
    watch = Stopwatch("start")
    with distributed.joined(flags):
        flags.workdir.mkdir(parents=True, exist_ok=True)
        with alone_in(flags.workdir) if distributed.is_first() else contextlib.nullcontext():
            run(flags.config, flags.workdir, watch)


def run(config: RunConfig, workdir: epath.Path, watch: Stopwatch) -> None:
    """Builds what the config describes and trains it."""
    keep_programs(workdir)
    mesh = make_mesh(config.mesh)
    pretrained = load_pretrained(config, mesh)
    loader = build.make_loader(config, workdir, pretrained, mesh)
    network = build.make_backbone(config, pretrained)
    claim(config, workdir, write=distributed.is_first())
    training = build.make_training(config, network, pretrained, mesh)
    checkpoints = Checkpoints(workdir / CHECKPOINTS, keep=config.train.keep)
    state = begin(training, checkpoints)
    begun = int(state.examples)
    flops = flops_per_example(config, pretrained)
    evaluated = make_evaluated(config, workdir, network, pretrained, mesh)
    hooks = make_hooks(config, workdir, checkpoints, begun, flops, evaluated)
    loader.seek(begun)
    step = jit_step(training.step, training.abstract, mesh)
    try:
        state = fit(
            lambda state, batch: step(state, pretrained.params, batch),
            state,
            prefetch(loader, mesh),
            until=config.train.examples,
            hooks=hooks,
            watch=watch,
        )
    finally:
        loader.close()
        watch.close()
        if distributed.is_first():
            tell_time(watch, workdir, begun)
    if distributed.is_first():
        append_record(workdir / "record.jsonl", record(config, workdir, state, flops))


def keep_programs(workdir: epath.Path) -> None:
    """Keeps what is compiled in WORKDIR/compiled, if the user keeps it nowhere else."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        # With those the directory would be part of the keys, and nothing found after a move.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def tell_time(watch: Stopwatch, workdir: epath.Path, begun: int) -> None:
    """Says where the time went, and keeps it: one line for each time that the command ran."""
    logging.info("%s", watch)
    if again := watch.programs["recompiled"]:
        logging.warning("The step was compiled %d times more after its first.", again)
    seconds = {part: round(value, 3) for part, value in watch.seconds.items()}
    line = {"from": begun, **watch.programs, "seconds": seconds}
    with tolerated("Where the time went"):  # nor may this hide why a run ends
        append_line(workdir / "goodput.jsonl", line)


def begin(training: build.Training, checkpoints: Checkpoints) -> State:
    """The newest sound checkpoint, or a fresh state where there is no checkpoint at all."""
    if checkpoints.latest() is None:
        return training.init()
    state = checkpoints.restore(training.abstract)
    logging.info("Continuing after %d examples.", int(state.examples))
    return state


class Evaluated(NamedTuple):
    """What a model in training is evaluated by, and on."""

    prompts: Prompts
    scoring: Scoring
    evaluator: Evaluator
    validate: Callable[..., dict[str, float]]
    frozen: Params
    described: dict[str, str]  # what scores depend on


def make_evaluated(
    config: RunConfig,
    workdir: epath.Path,
    network: Functional,
    pretrained: Pretrained,
    mesh: jax.sharding.Mesh,
) -> Evaluated:
    """What the config describes of it."""
    prompts = build.make_prompts(config, workdir)
    warn_of_truncation([*prompts.texts, config.sampling.negative], pretrained.text)
    networks, tokenizer = pretrained.scoring, pretrained.clip_tokenizer
    reference = make_reference(config, workdir, networks, mesh)
    scoring = make_scoring(config, prompts, networks, tokenizer, mesh, reference=reference)
    evaluator = build.make_evaluator(config, prompts, network, pretrained, scoring.viewer)
    validate = build.make_validation(config, workdir, network, pretrained, mesh)
    described = {"prompts": prompts.digest, "reference": reference.digest if reference else ""}
    return Evaluated(prompts, scoring, evaluator, validate, pretrained.params, described)


def make_hooks(
    config: RunConfig,
    workdir: epath.Path,
    checkpoints: Checkpoints,
    begun: int,
    flops: float,
    evaluated: Evaluated,
) -> list[Hook]:
    """What looks on, in the order in which it is asked: what writes for people is the first process's."""
    guard = Guard(workdir, checkpoints.latest, factor=config.train.explosion)
    metrics, shown, traced = None, [], []
    if distributed.is_first():
        metrics = Metrics(workdir, config.train.log_every, tensorboard(workdir), begun)
        shown = [metrics, Progress(config.train.examples, flops)]
        if config.train.profile:
            traced = [Profiler(workdir / "profile", *config.train.profile)]
    settle = (guard.settle, metrics.settle) if metrics else (guard.settle,)
    preemption = Preemption(checkpoints, distributed.PREEMPTED, settle=settle)
    evaluate = Evaluate(config, workdir, evaluated, metrics, guard.settle, preemption.check)
    save = Save(checkpoints, config.train.save_every, settle=settle)
    return [guard, *shown, Every(config.eval.every, evaluate), save, preemption, *traced]


class Evaluate(Hook):
    """Samples of fixed prompts, their scores and the validation loss, by all processes together.

    That with `metrics` writes them there and into the journal. `settle` is asked first, and between two batches `check`
    may end the run, which then begins with the evaluation that it owes.
    """

    part = "evaluation"

    def __init__(
        self,
        config: RunConfig,
        workdir: epath.Path,
        evaluated: Evaluated,
        metrics: Metrics | None,
        settle: Callable[[], None],
        check: Callable[[State], None],
    ) -> None:
        self._config, self._evaluated, self._metrics = config, evaluated, metrics
        self._settle, self._check = settle, check
        self._journal = (
            Journal(workdir, config.eval.shown, evaluated.described) if metrics else None
        )
        if self._journal:
            self._journal.prompts(evaluated.prompts)

    def begin(self, state: State) -> None:
        """Scores what training starts from, or makes up for an evaluation that was not written down."""
        examples = int(state.examples)
        if not examples:
            self._untrained(state)
        elif self._owed(examples):
            self._write(examples, state)

    def __call__(self, tick: Tick) -> None:
        self._settle()  # no state is scored that the guard would refuse
        self._write(tick.examples, tick.state)

    def close(self) -> None:
        """Every evaluation is written when it is made."""

    def _owed(self, examples: int) -> bool:
        """Whether one was due after the last step and is not in the journal, which the first process asks for all."""
        train, period = self._config.train, self._config.eval.every
        due = examples // period > (examples - train.batch) // period or examples >= train.examples
        missing = self._journal is not None and not self._journal.has(examples)
        return due and bool(distributed.agreed(missing))

    def _untrained(self, state: State) -> None:
        """The model before training, and the true images where the prompts have them."""
        references = {"untrained": self._write(0, state, "raw")}
        prompts, scoring, frozen = (
            self._evaluated.prompts,
            self._evaluated.scoring,
            self._evaluated.frozen,
        )
        if prompts.scenes:
            pixels = np.stack([render(scene) for scene in prompts.scenes])
            features = scoring.viewer(frozen, [np.asarray(to_images(pixels))])
            references["true renders"] = self._scores(features)
            if self._journal:
                self._journal.picture("samples/true.png", pixels)
        if self._journal:
            self._journal.references(references)

    def _write(
        self, examples: int, state: State, weights: str | None = None
    ) -> dict[str, Estimate]:
        weights = weights or self._config.eval.weights
        params = state.average if weights == "ema" else state.params
        pause = functools.partial(self._check, state)
        _, _, evaluator, validate, frozen, _ = self._evaluated
        # The first process alone shows images, but all hold what the devices have alike.
        drawn = evaluator(
            params,
            frozen,
            self._config.sampling.guidance,
            kept=self._config.eval.shown,
            pause=pause,
        )
        losses = validate(params, frozen, pause)
        scores = self._scores(drawn.features)
        if self._journal:
            self._told(examples, weights, drawn.images, scores, losses)
        return scores

    def _scores(self, features: Features) -> dict[str, Estimate]:
        """By the first process, for it writes them; a score that fails ends no run."""
        scores: dict[str, Estimate] = {}
        if self._journal:
            with tolerated("The scores of an evaluation"):
                scores = self._evaluated.scoring.scores(features)
        return scores

    def _told(
        self,
        examples: int,
        weights: str,
        images: Pixels,
        scores: dict[str, Estimate],
        losses: dict[str, float],
    ) -> None:
        with tolerated(f"The evaluation after {examples} examples"):
            self._journal.add(examples, weights, images, scores, losses)
        scalars = {name: score.value for name, score in scores.items()}
        scalars |= {f"validation_loss/{level}": loss for level, loss in losses.items()}
        self._metrics.write(examples, scalars)
        self._metrics.write_images(examples, {"samples": images[:8]})
        text = ", ".join(f"{name} {scores[name].value:.3f}" for name in METRICS if name in scores)
        logging.info("%d examples: %s", examples, text)


def flops_per_example(config: RunConfig, pretrained: Pretrained) -> float:
    """Floating-point operations of the backbone in one training step, by example, whatever is recomputed."""
    side = config.data.size // pretrained.autoencoder.config.downsampling
    text_tokens = pretrained.text.tokenizers[0].max_length
    return float(count(config.backbone, side, text_tokens).training_flops)


def record(config: RunConfig, workdir: epath.Path, state: State, flops: float) -> RunRecord:
    """What the finished run was, what it cost and what came of it, from what it wrote."""
    rows = read_lines(workdir / "metrics.jsonl")
    steps = [row for row in rows if "examples_per_second" in row]
    begun = [0, *(row["examples"] for row in steps)]
    seconds = math.fsum(
        (row["examples"] - before) / row["examples_per_second"]
        for before, row in zip(begun, steps, strict=False)
    )
    (last,) = read_lines(workdir / "evaluations.jsonl")[-1:] or [None]
    if last is None or last["examples"] != int(state.examples):
        raise OSError(
            f"the last evaluation, after {state.examples} examples, could not be written to {workdir}; the same command"
            " makes it again"
        )
    return RunRecord(
        study="",
        config=json.loads(to_json(config)),
        commit=commit(),
        chips=distributed.machine(),
        seed=config.seed,
        params=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        flops=flops * int(state.examples),
        examples=int(state.examples),
        seconds=seconds,
        losses={"train": [row["loss"] for row in rows if "loss" in row][-1], **last["validation"]},
        scores={name: Estimate(*score) for name, score in last["scores"].items()},
    )


if __name__ == "__main__":
    run_command(main, RunConfig, description=__doc__, add_flags=distributed.add_flags)
