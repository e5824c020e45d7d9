"""Studies of how to sample: a family of models is trained, and each is sampled in every way of a grid.

`run` continues where it was stopped: models that are trained and cells that are recorded, of the same grid by the same
commit, are not made again. A cell is a model, a sampler, a number of steps, a scale of guidance and a seed; its record
is a line of WORKDIR/records.jsonl. `plan` says what the same grid comes to, and runs nothing.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
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
from ldm_jax.config import RunConfig, SamplingConfig
from ldm_jax.configuration import check_name, to_json
from ldm_jax.data.durable import alone_in
from ldm_jax.diffusion import SAMPLERS
from ldm_jax.evals import LOWER_IS_BETTER, METRICS
from ldm_jax.evals.cells import Cell
from ldm_jax.evals.features import Features
from ldm_jax.evals.scores import OfSets
from ldm_jax.evals.session import Session, Work, look
from ldm_jax.evaluate import Opened, open_model
from ldm_jax.models.flops import Count, count
from ldm_jax.parallel import distributed, make_mesh
from ldm_jax.parallel.chips import slice_named
from ldm_jax.programs import parts
from ldm_jax.scaling import pages
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

    Raises ValueError for a grid that cannot be: a name that does not exist, a thing given twice, nothing to compare.
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
            values = getattr(self, field)
            if not values or len(set(values)) < len(values):
                raise ValueError(
                    f"{field} of the study are {values}; they are one or more, each once"
                )
        if (
            not all(map(math.isfinite, self.guidance))
            or not 0 <= min(self.seeds) <= max(self.seeds) < 2**31
        ):
            raise ValueError(
                f"the study has guidance {self.guidance} and seeds {self.seeds}: finite, and 0 to 2^31"
            )
        self._check_models()
        self._check_others()

    def _check_models(self) -> None:
        if len(self.models) < 2 or self.prompts < 1:
            raise ValueError(
                f"the study has {len(self.models)} models and {self.prompts} prompts; it compares two models or more on"
                " prompts"
            )
        if len({config.data for config in self.models.values()}) > 1:
            raise ValueError(
                "the models of a study share their latents, and these differ in `data`"
            )
        for name in self.scores:
            if isinstance(METRICS[name], OfSets) and METRICS[name].expand is None:
                raise ValueError(
                    f"{name} has no numbers by prompt, of which a study makes intervals"
                )

    def _check_others(self) -> None:
        if self.sampler in self.others:
            raise ValueError(f"{self.sampler} is the study's sampler and one of the others, too")
        for name, steps in self.others.items():
            if alone := set(steps) - set(self.steps):
                raise ValueError(
                    f"{name} is to take {min(alone)} steps, at which {self.sampler} has no best guidance: its steps are"
                    f" {', '.join(map(str, self.steps))}"
                )

    @functools.cached_property
    def digest(self) -> str:
        """Of all that decides the cells; records of another one are of another study."""
        settings = {name: decisive(config) for name, config in self.models.items()}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _digest(fields | {"models": settings})


# Settings that decide nothing of a model or its images; fnmatch patterns of dotted paths.
INDIFFERENT = (
    *("mesh.*", "data.records", "data.workers", "data.encode_batch", "train.log_every"),
    *("train.save_every", "train.keep", "train.profile", "eval.shown", "eval.every"),
)


def decisive(config: RunConfig) -> dict[str, Any]:
    """The settings of a run by dotted path, all but `INDIFFERENT` ones."""
    return {
        path: value
        for path, value in pages.flat(json.loads(to_json(config)))
        if not any(fnmatch.fnmatch(path, pattern) for pattern in INDIFFERENT)
    }


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


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
    once = counted.total.flops
    for steps in study.steps:
        names = [study.sampler, *(name for name, own in study.others.items() if steps in own)]
        for name in names:
            sampling = dataclasses.replace(config.sampling, sampler=SAMPLERS[name](), steps=steps)
            own = dataclasses.replace(config, sampling=sampling)
            passes = int(diffusion.calls(sampling.sampler, build.walk(own)).sum())
            cost = passes * once / unit
            if cost <= study.cost:
                yield Way(name, sampling, cost, float(build.evaluations(own) * once))
            elif name == study.sampler:  # without it no guidance is the best
                break


def run(study: SamplingStudy, workdir: epath.PathLike) -> list[SamplingRecord]:
    """Trains and samples what is not there yet; the records of the grid.

    Of several processes, joined before, all call it, and the first one has the records. Their latents are to be made
    before, in WORKDIR/latents.

    Raises:
      ValueError: the directory is in a bucket and the latents have no place of their own, or the study has other
        prompts than its models.
    """
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with alone_in(workdir) if distributed.is_first() else contextlib.nullcontext():
        train.keep_programs(workdir)
        found = [placed(model, workdir) for model in models(study)]
        ledger = Ledger(study, workdir / LEDGER, sum(count_cells(study, model) for model in found))
        build.records(found[0].config, workdir)  # or it is in a bucket
        if jax.process_count() == 1:
            encode.main(argparse.Namespace(config=found[0].config, workdir=workdir))
        for model in found:
            check_prompts(study, model, workdir)
        for model in found:
            trained(model, home(model, workdir))
        for model in found:
            sampled(study, model, home(model, workdir), ledger)
        return ledger.records


def check_prompts(study: SamplingStudy, model: Model, workdir: epath.Path) -> None:
    """Raises ValueError where a model has not as many prompts as the study is of."""
    given = len(build.make_prompts(model.config, workdir).texts)
    if given != study.prompts:
        spec = model.config.eval.prompts
        raise ValueError(f"the study is of {study.prompts} prompts, and {spec} has {given}")


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
    """Where a model is trained and sampled: a directory of its own for everything that decides it."""
    return workdir / "models" / f"{model.name}-{_digest(decisive(model.config))[:8]}"


def trained(model: Model, directory: epath.Path) -> None:
    """Trains a model, if that is not done."""
    path, wanted = directory / "record.jsonl", model.config.train.examples
    done = path.exists() and any(r.examples == wanted for r in read_records(RunRecord, path))
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

    def add(self, facts: Mapping[str, Any]) -> SamplingRecord:
        """Writes the record of a cell."""
        record = SamplingRecord(**self.own, cells=self._total, **facts)
        append_record(self._path, record)
        self._found[_place(record)] = record
        where = " ".join(map(str, _place(record)))
        scores = ", ".join(f"{name} {score.value:.4g}" for name, score in record.scores.items())
        _log.info("%d of %d cells: %s: %s", len(self._found), self._total, where, scores)
        return record


def _place(record: SamplingRecord) -> tuple[str, str, int, float, int]:
    return record.model, record.sampler, record.steps, record.guidance, record.seed


def sampled(study: SamplingStudy, model: Model, directory: epath.Path, ledger: Ledger) -> None:
    """Draws and scores every cell of a model that is not recorded; opens the model if there is one."""
    mesh = make_mesh(model.config.mesh)
    opener = functools.cache(functools.partial(open_model, model.config, directory, mesh))
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
    opener: Callable[[], Opened],
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


def seen(opened: Opened, work: Work, code: str) -> tuple[Features | None, int, float]:
    """The features of a cell, which are made where they are not there: how many, and how many a second.

    On the first process; the others have None.
    """
    cell = Cell(opened.workdir, work.label, work.facts | {"code": code})
    session = Session(opened.workdir, opened.scoring.scores, {}, 0, False, {})
    drawn, rate = look(session, work, cell)
    return cell.finish() if distributed.is_first() else None, drawn, rate


def described(
    study: SamplingStudy, model: Model, way: Way, opened: Opened, features: Features
) -> dict[str, Any]:
    """What a record says of a cell, but for its guidance, its seed and its time."""
    scores, values = opened.scoring.scores(features), opened.scoring.scores.by_prompt(features)
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
    return int(np.nanargmax(sign * np.reshape(means, (len(scales), -1)).mean(axis=1)))


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

    The backbones alone are counted, as in paper A: encoding, text, decoding and scoring come on top.
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
    yield f"{'(backbones alone)':<20} {'images':>15} {'PFLOPs':>12} {'days':>9} {'chip-hours':>11}"
    for what, images, flops in found:
        hours = flops / rate / 3600
        yield f"{what:<20} {images:>15,} {flops / 1e15:>12,.0f} {hours / 24:>9.3f} {hours * chips:>11,.1f}"


def _sum(found: Sequence[Need], kind: str) -> tuple[int, float]:
    of_kind = [need for need in found if need.what.startswith(kind)]
    return sum(need.images for need in of_kind), math.fsum(need.flops for need in of_kind)
