"""Studies of how to sample: a family of models is trained, and each is sampled in every way of a grid.

`run` continues where it was stopped: models that are trained and cells that are recorded, of the same grid by the same
commit, are not made again. A cell is a model, a sampler, a number of steps, a scale of guidance and a seed; its record
is a line of WORKDIR/records.jsonl. `plan` says what the same grid comes to, and runs nothing.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from ldm_jax import build, diffusion, encode, train
from ldm_jax.config import RunConfig, SamplingConfig, claim
from ldm_jax.configuration import check_name, to_json
from ldm_jax.data.durable import alone_in
from ldm_jax.diffusion import SAMPLERS
from ldm_jax.evals import LOWER_IS_BETTER, METRICS
from ldm_jax.evals.cells import Cell
from ldm_jax.evals.session import Session, Work, look
from ldm_jax.evaluate import Opened, open_model
from ldm_jax.models.flops import Count, count
from ldm_jax.parallel import distributed, make_mesh
from ldm_jax.parallel.chips import slice_named
from ldm_jax.programs import parts
from ldm_jax.scaling.records import (
    RunRecord,
    SamplingRecord,
    append_record,
    commit,
    read_records,
)
from ldm_jax.training import Stopwatch

LEDGER = "records.jsonl"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SamplingStudy:
    """A grid of models x samplers x steps x scales of guidance x seeds.

    Raises ValueError for a grid that cannot be: a name that does not exist, steps below 1, nothing to compare.
    """

    name: str
    models: Mapping[
        str, RunConfig
    ]  # by name, the smallest first; each says its data and its prompts
    baseline: str  # the model of which a forward pass costs 1
    sampler: str  # at every scale of guidance
    others: Mapping[
        str, tuple[int, ...]
    ]  # numbers of steps of each, at the best scale that `sampler` has there
    steps: tuple[int, ...]  # of `sampler`
    guidance: tuple[float, ...]
    seeds: tuple[int, ...]
    scores: tuple[str, ...]  # by the first the best scale is chosen
    prompts: int  # how many there are
    cost: int | float = (
        math.inf
    )  # above which a model is not sampled: relative cost times evaluations

    def __post_init__(self) -> None:
        check_name(self.baseline, self.models, "the study's baseline")
        for name in (self.sampler, *self.others):
            check_name(name, SAMPLERS, "a sampler of the study")
        for name in self.scores:
            check_name(name, METRICS, "a score of the study")
        for field in ("steps", "guidance", "seeds", "scores"):
            if not getattr(self, field):
                raise ValueError(f"{field} of the study is empty")
        for name, steps in self.others.items():
            if alone := set(steps) - set(self.steps):
                raise ValueError(
                    f"{name} is to take {min(alone)} steps, at which {self.sampler} has no best guidance: its steps are"
                    f" {', '.join(map(str, self.steps))}"
                )

    @functools.cached_property
    def digest(self) -> str:
        """Of all that decides the cells; records of another one are of another study."""
        settings = {name: json.loads(to_json(config)) for name, config in self.models.items()}
        fields = vars(self) | {"models": settings}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


class Way(NamedTuple):
    """A sampler at a number of steps, of one model, and what an image costs it."""

    sampler: str
    sampling: SamplingConfig
    cost: float  # evaluations of the network, a pair counting once, times the model's relative cost
    flops: float  # of both branches


class Model(NamedTuple):
    """A model of a study, what it costs, and the ways that it is sampled in: `SamplingStudy.sampler` before others."""

    name: str
    config: RunConfig
    count: Count
    ways: tuple[Way, ...]


def models(study: SamplingStudy) -> list[Model]:
    """Every model with its ways; of shapes alone. Raises as `programs.parts` and `build.walk`."""
    counts = {name: forward(config) for name, config in study.models.items()}
    unit = counts[study.baseline].total.flops
    return [
        Model(name, config, counts[name], tuple(ways(study, config, counts[name], unit)))
        for name, config in study.models.items()
    ]


def forward(config: RunConfig) -> Count:
    """What a forward pass of a run's backbone costs for one image."""
    made = parts(config, make_mesh(config.mesh))
    return count(config.backbone, made.side, made.pretrained.text.tokenizers[0].max_length)


def ways(study: SamplingStudy, config: RunConfig, counted: Count, unit: int) -> Iterator[Way]:
    """How a model is sampled, as far as its cost may go; `unit` is what costs 1."""
    named, once = {study.sampler: study.steps, **study.others}, counted.total.flops
    for steps, name in itertools.product(study.steps, named):
        sampling = dataclasses.replace(config.sampling, sampler=SAMPLERS[name](), steps=steps)
        own = dataclasses.replace(config, sampling=sampling)
        passes = int(diffusion.calls(sampling.sampler, build.walk(own)).sum())
        cost = passes * once / unit
        if steps in named[name] and cost <= study.cost:
            yield Way(name, sampling, cost, float(build.evaluations(own) * once))


def run(study: SamplingStudy, workdir: epath.PathLike) -> list[SamplingRecord]:
    """Trains and samples what is not there yet; the records of the grid.

    Of several processes, joined before, all call it, and the first one has the records. Their latents are to be made
    before, in WORKDIR/latents. Raises ValueError where the directory of a model holds another run.
    """
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with alone_in(workdir) if distributed.is_first() else contextlib.nullcontext():
        train.keep_programs(workdir)
        found = [placed(model, workdir) for model in models(study)]
        ledger = Ledger(study, workdir / LEDGER, sum(count_cells(study, model) for model in found))
        if jax.process_count() == 1:
            encode.main(argparse.Namespace(config=found[0].config, workdir=workdir))
        for model in found:
            trained(model, home(model, workdir))
        for model in found:
            sampled(study, model, home(model, workdir), ledger)
        return ledger.records


def placed(model: Model, workdir: epath.Path) -> Model:
    """The model with the latents that all of a study share."""
    config = model.config
    latents = config.data.records or str(workdir / "latents")
    data = dataclasses.replace(config.data, records=latents)
    return model._replace(config=dataclasses.replace(config, data=data))


def scales_of(study: SamplingStudy, way: Way) -> int:
    """At how many scales of guidance a way is sampled."""
    return len(study.guidance) if way.sampler == study.sampler else 1


def count_cells(study: SamplingStudy, model: Model) -> int:
    """How many records a model comes to."""
    return len(study.seeds) * sum(scales_of(study, way) for way in model.ways)


def home(model: Model, workdir: epath.Path) -> epath.Path:
    """Where a model is trained and sampled."""
    return workdir / "models" / model.name


def trained(model: Model, directory: epath.Path) -> None:
    """Trains a model, if that is not done. Raises ValueError where the directory holds another run."""
    claim(model.config, directory, write=False)
    path, wanted = directory / "record.jsonl", model.config.train.examples
    done = path.exists() and any(r.examples >= wanted for r in read_records(RunRecord, path))
    if not distributed.agreed(bool(done)):
        _log.info("Training %s, of %.3g M parameters.", model.name, model.count.total.params / 1e6)
        directory.mkdir(parents=True, exist_ok=True)
        train.run(model.config, directory, Stopwatch("start"))


class Ledger:
    """The records of one grid by one commit; the first process has them and writes them."""

    def __init__(self, study: SamplingStudy, path: epath.PathLike, total: int) -> None:
        """Reads what is there of `total` cells, and says what is of another grid or commit."""
        self.own = {"study": study.name, "grid": study.digest, "commit": commit()}
        self._path, self._total, self._found = epath.Path(path), total, {}
        if distributed.is_first() and self._path.exists():
            records = read_records(SamplingRecord, path)
            own = [r for r in records if [r.study, r.grid, r.commit] == [*self.own.values()]]
            self._found = {_place(record): record for record in own}
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

    def add(self, record: SamplingRecord) -> None:
        """Writes the record of a cell."""
        append_record(self._path, record)
        self._found[_place(record)] = record
        where = " ".join(map(str, _place(record)))
        scores = ", ".join(f"{name} {score.value:.4g}" for name, score in record.scores.items())
        _log.info("%d of %d cells: %s: %s", len(self._found), self._total, where, scores)


def _place(record: SamplingRecord) -> tuple[str, str, int, float, int]:
    return record.model, record.sampler, record.steps, record.guidance, record.seed


def sampled(study: SamplingStudy, model: Model, directory: epath.Path, ledger: Ledger) -> None:
    """Draws and scores every cell of a model that is not recorded; opens the model if there is one."""
    opener = functools.cache(functools.partial(_opened, study, model, directory))
    best: dict[int, float] = {}
    for way in model.ways:
        steps, first = way.sampling.steps, way.sampler == study.sampler
        scales = study.guidance if first else (best[steps],)
        found = list(cells(study, model, way, scales, opener, ledger))
        if first:
            best[steps] = scales[distributed.agreed(best_of(study, scales, found))]


def _opened(study: SamplingStudy, model: Model, directory: epath.Path) -> Opened:
    opened = open_model(model.config, directory, make_mesh(model.config.mesh))
    if (given := len(opened.prompts.texts)) != study.prompts:
        spec = model.config.eval.prompts
        raise ValueError(f"the study is of {study.prompts} prompts, and {spec} has {given}")
    return opened


def cells(
    study: SamplingStudy,
    model: Model,
    way: Way,
    scales: Sequence[float],
    opener: Callable[[], Opened],
    ledger: Ledger,
) -> Iterator[SamplingRecord | None]:
    """The records of a way, scale by scale, those that are not there made now; None on other processes."""
    places = list(itertools.product(scales, study.seeds))
    works = functools.cache(lambda: opener().works(way.sampling, scales, study.seeds))
    warm = study.prompts > way.sampling.batch  # the rate is of what comes after the first batch
    for number, (scale, seed) in enumerate(places):
        record = ledger.get(model.name, way, scale, seed)
        if distributed.agreed(record is None):
            cost = {"cost": way.cost, "flops": way.flops}
            where = {"steps": way.sampling.steps, "guidance": scale, "seed": seed}
            made = scored(study, model, opener(), works()[number], ledger.own, timed=warm)
            warm = True
            if distributed.is_first():
                record = SamplingRecord(sampler=way.sampler, **where, **cost, **ledger.own, **made)
                ledger.add(record)
        yield record


def scored(
    study: SamplingStudy,
    model: Model,
    opened: Opened,
    work: Work,
    own: Mapping[str, str],
    *,
    timed: bool,
) -> dict[str, Any]:
    """What a record says of a cell that is drawn now: scores, numbers by prompt, seconds; {} on other processes."""
    cell = Cell(opened.workdir, work.label, work.facts | {"code": own["commit"]})
    session = Session(opened.workdir, opened.scoring.scores, {}, 0, False, {})
    count, rate = look(session, work, cell)
    if not distributed.is_first():
        return {}
    features = cell.finish()
    scores, values = opened.scoring.scores(features), opened.scoring.scores.by_prompt(features)
    return {
        "model": model.name,
        "params": model.count.total.params,
        "examples": opened.facts["model"]["examples"],
        "seconds": 1 / rate if timed and count else None,
        "scores": {name: scores[name] for name in study.scores},
        "values": {name: [float(f"{x:.5g}") for x in values[name]] for name in study.scores},
        "chips": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
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
    return int(np.argmax(sign * np.reshape(means, (len(scales), -1)).mean(axis=1)))


class Need(NamedTuple):
    """What a part of a study comes to."""

    what: str
    images: int  # seen in training, or drawn
    flops: float


def needs(study: SamplingStudy) -> Iterator[Need]:
    """Training and sampling, model by model."""
    each = study.prompts * len(study.seeds)
    for model in models(study):
        examples = model.config.train.examples
        yield Need(f"train {model.name}", examples, model.count.training_flops * examples)
        flops = math.fsum(way.flops * scales_of(study, way) for way in model.ways)
        yield Need(f"sample {model.name}", study.prompts * count_cells(study, model), each * flops)


def plan(study: SamplingStudy, topology: str, mfu: float) -> Iterator[str]:
    """What a study comes to on a slice such as "v5e:16x16", line by line: FLOPs, days and chip-hours at this use of it.

    Raises ValueError for a slice that there is not, and an `mfu` outside (0, 1].
    """
    if not 0 < mfu <= 1:
        raise ValueError(
            f"the use of the chips is {mfu:g}; it is a share of their peak, above 0 to 1"
        )
    row, chips = slice_named(topology)
    rate = chips * row.devices * row.peak * mfu
    found = list(needs(study))
    found += [Need(f"{kind} all", *_sum(found, kind)) for kind in ("train", "sample")]
    yield f"{'':<20} {'images':>15} {'PFLOPs':>12} {'days':>9} {'chip-hours':>11}"
    for what, images, flops in found:
        hours = flops / rate / 3600
        yield f"{what:<20} {images:>15,} {flops / 1e15:>12,.0f} {hours / 24:>9.3f} {hours * chips:>11,.1f}"


def _sum(found: Sequence[Need], kind: str) -> tuple[int, float]:
    of_kind = [need for need in found if need.what.startswith(kind)]
    return sum(need.images for need in of_kind), math.fsum(need.flops for need in of_kind)
