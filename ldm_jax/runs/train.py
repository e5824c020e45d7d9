"""Training of a run: the loop's hooks, the evaluations in it, and the record of a finished run."""

import functools
import json
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from ldm_jax.data.scenes import render
from ldm_jax.evals import METRICS
from ldm_jax.evals.evaluator import Evaluator
from ldm_jax.evals.features import Features
from ldm_jax.evals.journal import EvaluationLine, Journal
from ldm_jax.files.ledger import append_record, commit
from ldm_jax.files.lines import append_line, read_lines
from ldm_jax.metrics.resize import to_images
from ldm_jax.parallel import distributed
from ldm_jax.runs.config import claim
from ldm_jax.runs.run import Run
from ldm_jax.runs.scoring import Scoring, make_scoring
from ldm_jax.runs.validation import Validate, make_validation
from ldm_jax.settings.schema import to_json
from ldm_jax.training import Every, Hook, State, Stopwatch, Tick, fit, prefetch
from ldm_jax.training.hooks import Guard, Metrics, MetricsLine, Profiler, Progress, tensorboard
from ldm_jax.training.loop import tolerated
from ldm_jax.training.record import RunRecord
from ldm_jax.training.saving import Preemption, Save, Saver
from ldm_jax.types import Estimate, Pixels


def train(run: Run, watch: Stopwatch) -> None:
    """Trains from the newest checkpoint, or from the beginning, and writes all of it into the working directory."""
    keep_programs(run.workdir)
    loader, step, frozen = run.loader(), run.jit_step(), run.frozen.params
    first = distributed.is_first()
    claim(run.config, run.workdir, write=first)
    run.checkpoints.check_writable()
    state = run.state()
    begun = int(state.examples)
    hooks = make_hooks(run, begun, make_evaluated(run))
    loader.seek(begun)
    try:
        state = fit(
            lambda state, batch: step(state, frozen, batch),
            state,
            prefetch(loader, run.mesh),
            until=run.config.train.examples,
            hooks=hooks,
            watch=watch,
        )
    finally:
        loader.close()
        watch.close()
        if first:
            tell_time(watch, run.workdir, begun)
    if first:
        append_record(run.workdir / "record.jsonl", record(run, state))


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


class Evaluated(NamedTuple):
    """The parts of an evaluation of a model in training."""

    scoring: Scoring
    evaluator: Evaluator
    validate: Validate


def make_evaluated(run: Run) -> Evaluated:
    """Makes the parts of an evaluation that the config describes."""
    scoring = make_scoring(run, run.prompts)
    return Evaluated(scoring, run.evaluator(scoring.viewer), make_validation(run))


def make_hooks(run: Run, begun: int, evaluated: Evaluated) -> list[Hook]:
    """Makes the hooks in the order in which they are called; those that write for people are the first process's."""
    train, workdir, checkpoints = run.config.train, run.workdir, run.checkpoints
    losses = checkpoints.losses(begun)
    guard = Guard(workdir, checkpoints.latest, factor=train.explosion, losses=losses)
    metrics, shown, traced = None, [], []
    if distributed.is_first():
        metrics = Metrics(workdir, train.log_every, tensorboard(workdir), begun)
        shown = [metrics, Progress(train.examples, flops_per_example(run))]
        if train.profile:
            traced = [Profiler(workdir / "profile", *train.profile)]
    saver = Saver(checkpoints, guard, settle=(metrics.settle,) if metrics else ())
    preemption = Preemption(saver)
    evaluate = Evaluate(run, evaluated, metrics, guard.settle, preemption.check)
    save = Save(saver, train.save_every)
    return [guard, *shown, Every(run.config.eval.every, evaluate), save, preemption, *traced]


class Evaluate(Hook):
    """Samples of fixed prompts, their scores and the validation loss, by all processes together.

    That with `metrics` writes them there and into the journal. `settle` is asked first, and between two batches `check`
    may end the run, which then begins with the evaluation that it owes.
    """

    part = "evaluation"

    def __init__(
        self,
        run: Run,
        evaluated: Evaluated,
        metrics: Metrics | None,
        settle: Callable[[], None],
        check: Callable[[State], None],
    ) -> None:
        self._run, self._evaluated, self._metrics = run, evaluated, metrics
        self._settle, self._check = settle, check
        self._journal = None
        if metrics:
            reference = evaluated.scoring.reference
            compared = {
                "prompts": run.prompts.digest,
                "reference": reference.digest if reference else "",
            }
            self._journal = Journal(run.workdir, run.config.eval.shown, compared)
            self._journal.prompts(run.prompts)

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
        train, period = self._run.config.train, self._run.config.eval.every
        due = examples // period > (examples - train.batch) // period or examples >= train.examples
        missing = self._journal is not None and not self._journal.has(examples)
        return due and bool(distributed.agreed(missing))

    def _untrained(self, state: State) -> None:
        """The model before training, and the true images where the prompts have them."""
        references = {"untrained": self._write(0, state, "raw")}
        if scenes := self._run.prompts.scenes:
            pixels = np.stack([render(scene) for scene in scenes])
            viewer = self._evaluated.scoring.viewer
            features = viewer(self._run.frozen.params, [np.asarray(to_images(pixels))])
            references["true renders"] = self._scores(features)
            if self._journal:
                with tolerated("The picture of true images"):
                    self._journal.picture("samples/true.png", pixels)
        if self._journal:
            with tolerated("The scores that a model is measured against"):
                self._journal.references(references)

    def _write(
        self, examples: int, state: State, weights: str | None = None
    ) -> dict[str, Estimate]:
        config, frozen = self._run.config, self._run.frozen.params
        weights = weights or config.eval.weights
        params = state.average if weights == "ema" else state.params
        pause = functools.partial(self._check, state)
        # The first process alone shows images, but all hold what the devices have alike.
        drawn = self._evaluated.evaluator(
            params, frozen, config.sampling.guidance, kept=config.eval.shown, pause=pause
        )
        losses = self._evaluated.validate(params, frozen, pause)
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


def flops_per_example(run: Run) -> float:
    """Counts the operations of the backbone in one training step, per example, recomputation left out."""
    return float(run.count.training_flops)


def record(run: Run, state: State) -> RunRecord:
    """Describes the finished run from what it wrote: what it was, what it cost and its last scores."""
    config, workdir = run.config, run.workdir
    rows = read_lines(workdir / "metrics.jsonl", MetricsLine)
    steps = [row for row in rows if "examples_per_second" in row]
    begun = [0, *(row["examples"] for row in steps)]
    seconds = math.fsum(
        (row["examples"] - before) / row["examples_per_second"]
        for before, row in zip(begun, steps, strict=False)
    )
    (last,) = read_lines(workdir / "evaluations.jsonl", EvaluationLine)[-1:] or [None]
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
        flops=flops_per_example(run) * int(state.examples),
        examples=int(state.examples),
        seconds=seconds,
        losses={"train": [row["loss"] for row in rows if "loss" in row][-1], **last["validation"]},
        scores=last["scores"],
    )
