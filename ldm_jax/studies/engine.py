"""Runs a study of how to sample: a family of models is trained, and each is sampled in every way of a grid.

It continues where it was stopped: models that are trained and cells that are recorded, of the same grid by the same
commit, are not made again. A cell is a model, a sampler, a number of steps, a scale of guidance and a seed; its record
is a line of WORKDIR/records.jsonl.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ldm_jax.evals import LOWER_IS_BETTER
from ldm_jax.evals.cells import Cell
from ldm_jax.evals.features import Features
from ldm_jax.evals.session import Session, Work, look
from ldm_jax.files.ledger import append_record, commit, read_records
from ldm_jax.parallel import distributed
from ldm_jax.runs import evaluate as evaluation
from ldm_jax.runs.encode import encode
from ldm_jax.runs.run import Run, alone_among_runs
from ldm_jax.runs.train import keep_programs, train
from ldm_jax.settings.fields import PARAMETERS
from ldm_jax.settings.schema import decisive
from ldm_jax.studies.records import SamplingRecord
from ldm_jax.studies.sampling import (
    Model,
    SamplingStudy,
    Way,
    count_cells,
    digest_of,
    models,
)
from ldm_jax.training import Stopwatch
from ldm_jax.training.record import RunRecord

LEDGER = "records.jsonl"
_log = logging.getLogger(__name__)


def run(study: SamplingStudy, workdir: epath.PathLike) -> list[SamplingRecord]:
    """Trains and samples what is not there yet; the records of the grid.

    Of several processes, joined before, all call it, and the first one has the records. Their latents are to be made
    before, in WORKDIR/latents.

    Raises:
      ValueError: the directory is in a bucket and the latents have no place of their own, or the study has other
        prompts than its models.
    """
    workdir = epath.Path(workdir)
    with alone_among_runs(workdir):
        keep_programs(workdir)
        found = [placed(model, workdir) for model in models(study)]
        ledger = Ledger(study, workdir / LEDGER, sum(count_cells(study, model) for model in found))
        first = Run(found[0].config, workdir)
        first.records()  # or it is in a bucket
        if jax.process_count() == 1:
            encode(first)
        for model in found:
            check_prompts(study, Run(model.config, workdir))
        for model in found:
            trained(model, Run(model.config, home(model, workdir)))
        for model in found:
            sampled(study, model, Run(model.config, home(model, workdir)), ledger)
        return ledger.records


def check_prompts(study: SamplingStudy, run: Run) -> None:
    """Raises ValueError where a model has not as many prompts as the study is of."""
    given = len(run.read_prompts().texts)
    if given != study.prompts:
        spec = run.config.eval.prompts
        raise ValueError(f"the study is of {study.prompts} prompts, and {spec} has {given}")


def placed(model: Model, workdir: epath.Path) -> Model:
    """The model with the latents that all of a study share."""
    config = model.config
    latents = config.data.records or str(workdir / "latents")
    data = dataclasses.replace(config.data, records=latents)
    return model._replace(config=dataclasses.replace(config, data=data))


def home(model: Model, workdir: epath.Path) -> epath.Path:
    """Where a model is trained and sampled: a directory of its own for everything that decides its parameters."""
    digest = digest_of(decisive(model.config, PARAMETERS))
    return workdir / "models" / f"{model.name}-{digest[:8]}"


def trained(model: Model, run: Run) -> None:
    """Trains a model, if that is not done."""
    path, wanted = run.workdir / "record.jsonl", run.config.train.examples
    done = path.exists() and any(r.examples == wanted for r in read_records(RunRecord, path))
    if not distributed.agreed(bool(done)):
        _log.info("Training %s, of %.3g M parameters.", model.name, model.count.total.params / 1e6)
        run.workdir.mkdir(parents=True, exist_ok=True)
        train(run, Stopwatch("start"))


class Ledger:
    """The records of one grid by one commit; the first process has them and writes them."""

    def __init__(self, study: SamplingStudy, path: epath.PathLike, total: int) -> None:
        """Reads what is there of `total` cells, and says what is of another grid or commit."""
        self.own = {"study": study.name, "grid": study.digest, "commit": commit()}
        self._path, self._total, self._found = epath.Path(path), total, {}
        if distributed.is_first() and self._path.exists():
            records = read_records(SamplingRecord, path)
            own = [record for record in records if record.group == tuple(self.own.values())]
            self._found = {record.place: record for record in own}
            if others := len(records) - len(own):
                _log.warning(
                    "%s has %d records of another grid or commit, kept apart.", path, others
                )

    @property
    def records(self) -> list[SamplingRecord]:
        """Those that there are."""
        return list(self._found.values())

    def get(self, model: str, way: Way, guidance: float, seed: int) -> SamplingRecord | None:
        """The record of a cell, if it is there."""
        return self._found.get((model, way.sampler, way.sampling.steps, guidance, seed))

    def add(self, facts: Mapping[str, Any]) -> SamplingRecord:
        """Writes the record of a cell."""
        record = SamplingRecord(**self.own, cells=self._total, **facts)
        append_record(self._path, record)
        self._found[record.place] = record
        where = " ".join(map(str, record.place))
        scores = ", ".join(f"{name} {score.value:.4g}" for name, score in record.scores.items())
        _log.info("%d of %d cells: %s: %s", len(self._found), self._total, where, scores)
        return record


def sampled(study: SamplingStudy, model: Model, run: Run, ledger: Ledger) -> None:
    """Draws and scores every cell of a model that is not recorded; opens the model if there is one."""
    opener = functools.cache(functools.partial(evaluation.Model, run))
    best: dict[int, float] = {}
    for way in model.ways:
        steps, first = way.sampling.steps, way.sampler == study.sampler
        scales = study.guidance if first else (best[steps],)
        found = list(cells(study, model, way, scales, opener, ledger))
        if first:
            best[steps] = scales[distributed.agreed(best_of(study, scales, found))]


def cells(
    study: SamplingStudy,
    model: Model,
    way: Way,
    scales: Sequence[float],
    opener: Callable[[], evaluation.Model],
    ledger: Ledger,
) -> Iterator[SamplingRecord | None]:
    """The records of a way, scale by scale, those that are not there made now; None on other processes."""
    works = functools.cache(lambda: opener().works(way.sampling, scales, study.seeds))
    warm = False  # whether the program has run
    for number, (scale, seed) in enumerate(itertools.product(scales, study.seeds)):
        record = ledger.get(model.name, way, scale, seed)
        if distributed.agreed(record is None):
            features, drawn, rate = seen(opener(), works()[number], ledger.own["commit"])
            timed = warm or drawn > way.sampling.batch
            warm = warm or drawn > 0
            if features is not None:
                where = {
                    "guidance": scale,
                    "seed": seed,
                    "seconds": 1 / rate if timed and rate else None,
                }
                record = ledger.add(described(study, model, way, opener(), features) | where)
        yield record


def seen(opened: evaluation.Model, work: Work, code: str) -> tuple[Features | None, int, float]:
    """The features of a cell, which are made where they are not there: how many, and how many a second.

    On the first process; the others have None.
    """
    workdir = opened.run.workdir
    cell = Cell(workdir, work.label, work.facts | {"code": code})
    session = Session(workdir, opened.scoring.scores, {}, 0, False, {})
    drawn, rate = look(session, work, cell)
    return cell.finish() if distributed.is_first() else None, drawn, rate


def described(
    study: SamplingStudy, model: Model, way: Way, opened: evaluation.Model, features: Features
) -> dict[str, Any]:
    """What a record says of a cell, but for its guidance, its seed and its time."""
    scores = opened.scoring.scores(features)
    values = opened.scoring.scores.by_prompt(features, scores)
    return {
        "model": model.name,
        "params": model.count.total.params,
        "examples": opened.facts["model"]["examples"],
        "sampler": way.sampler,
        "steps": way.sampling.steps,
        "cost": way.cost,
        "flops": way.flops,
        "scores": {name: scores[name] for name in study.scores},
        "values": {name: [float(f"{x:.5g}") for x in values[name]] for name in study.scores},
        "chips": distributed.machine(),
    }


def best_of(
    study: SamplingStudy, scales: Sequence[float], found: Sequence[SamplingRecord | None]
) -> int:
    """The number of the scale with the best first score over seeds; 0 on other processes."""
    if not distributed.is_first():
        return 0
    name = study.scores[0]
    sign = -1 if name in LOWER_IS_BETTER else 1
    means = [np.nanmean(record.values[name]) for record in found]
    return int(np.nanargmax(sign * np.reshape(means, (len(scales), -1)).mean(axis=1)))
