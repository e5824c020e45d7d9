"""A study of how to sample, as a grid: what is in it, what each part of it costs, what the whole comes to."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm_jax import diffusion
from ldm_jax.diffusion import SAMPLERS, Schedule, Spacing
from ldm_jax.evals import METRICS
from ldm_jax.evals.scores import OfSets
from ldm_jax.models.flops import Count
from ldm_jax.parallel.chips import slice_named
from ldm_jax.planning.programs import Planned
from ldm_jax.runs.config import RunConfig, SamplingConfig
from ldm_jax.runs.run import Run
from ldm_jax.settings.fields import IMAGES, PARAMETERS, SCORES, check_name
from ldm_jax.settings.ranges import check_seed
from ldm_jax.settings.schema import decisive


@dataclasses.dataclass(frozen=True)
class SamplingStudy:
    """A grid of models x samplers x steps x scales of guidance x seeds.

    Attributes:
      models: by name, the smallest first, on the same data.
      baseline: the model of which a forward pass costs 1.
      sampler, steps: what is sampled at every scale of guidance.
      others: other samplers and their steps, at the best scale that `sampler` has there by the first score.
      scores: rows of METRICS.
      prompts: how many there are; the models say which.
      cost: above which a model is not sampled: relative cost times passes.

    Raises ValueError for a grid that cannot be: a name that does not exist, a thing given twice, nothing to compare.
    """

    name: str
    models: Mapping[str, RunConfig]
    baseline: str
    sampler: str
    others: Mapping[str, tuple[int, ...]]
    steps: tuple[int, ...]
    guidance: tuple[float, ...]
    seeds: tuple[int, ...]
    scores: tuple[str, ...]
    prompts: int
    cost: int | float = math.inf

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
        if not all(map(math.isfinite, self.guidance)):
            raise ValueError(f"guidance of the study is {self.guidance}; its scales are finite")
        for seed in self.seeds:
            check_seed(seed, "one of the seeds of the study")
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
            for model, config in self.models.items():
                if name not in config.eval.metrics:
                    raise ValueError(
                        f"{name} is a score of the study, and eval.metrics of {model} does not name it:"
                        f" {', '.join(config.eval.metrics) or 'it names none'}"
                    )

    def _check_others(self) -> None:
        if self.sampler in self.others:
            raise ValueError(f"{self.sampler} is the study's sampler and one of the others, too")
        for name in (self.sampler, *self.others):
            if SAMPLERS[name]().order == 0:
                raise ValueError(
                    f"{name} is a sampler of the study and samples distilled models only, and {self.baseline} is not"
                    " distilled: leave it out"
                )
        for name, steps in self.others.items():
            if alone := set(steps) - set(self.steps):
                raise ValueError(
                    f"{name} is to take {min(alone)} steps, at which {self.sampler} has no best guidance: its steps are"
                    f" {', '.join(map(str, self.steps))}"
                )

    def check_rules(self) -> None:
        """Refuses two samplers that do the same at every number of steps that both take.

        It computes, which processes must not before they have joined: so `models` asks for it, and not the constructor.
        """
        config, steps = self.models[self.baseline], {self.sampler: self.steps, **self.others}
        for one, other in itertools.combinations(steps, 2):
            shared = sorted(set(steps[one]) & set(steps[other]), reverse=True)
            walks = (
                [_walk(name, config.schedule, config.sampling.spacing, n) for name in (one, other)]
                for n in shared
            )
            if shared and all(np.allclose(*pair, rtol=1e-3, atol=1e-5) for pair in walks):
                raise ValueError(
                    f"{one} and {other} are one rule at the study's {', '.join(map(str, shared))} steps, so that they"
                    " would count twice: leave one of them out"
                )

    @functools.cached_property
    def digest(self) -> str:
        """Of all that decides the cells; records of another one are of another study."""
        what = PARAMETERS, IMAGES, SCORES
        settings = {name: decisive(config, *what) for name, config in self.models.items()}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return digest_of(fields | {"models": settings})


@functools.cache
def _walk(sampler: str, schedule: Schedule, spacing: Spacing, steps: int) -> np.ndarray:
    grid = diffusion.grid(schedule, spacing, steps)
    return diffusion.walk_on_normal_data(SAMPLERS[sampler](), grid)


def digest_of(facts: Any) -> str:
    """Sixteen digits of what can be JSON."""
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
    """Every model with its ways; of shapes alone.

    Raises as `Planned.frozen`, `Run.walk` and `check_rules`, and ValueError where a model costs too much to be sampled
    at all.
    """
    study.check_rules()
    runs = {name: Planned(config) for name, config in study.models.items()}
    unit = runs[study.baseline].count.total.flops
    found = [
        Model(name, run.config, run.count, tuple(ways(study, run, unit)))
        for name, run in runs.items()
    ]
    for model in found:
        if not model.ways:
            raise ValueError(f"no way to sample {model.name} costs {study.cost:g} or less")
    return found


def ways(study: SamplingStudy, run: Run, unit: int) -> Iterator[Way]:
    """How a model is sampled, as far as its cost may go; `unit` is what costs 1."""
    for steps in study.steps:
        others = (name for name, own in study.others.items() if steps in own)
        found = [way(run, name, steps, unit) for name in (study.sampler, *others)]
        if found[0].cost <= study.cost:  # without it no guidance is the best
            yield from (each for each in found if each.cost <= study.cost)


def way(run: Run, name: str, steps: int, unit: int) -> Way:
    """A sampler at a number of steps. Raises as `Run.walk`."""
    sampling = dataclasses.replace(run.config.sampling, sampler=SAMPLERS[name](), steps=steps)
    own, once = run.sampled_by(sampling), run.count.total.flops
    passes = int(diffusion.calls(sampling.sampler, own.walk()).sum())
    return Way(name, sampling, passes * once / unit, float(own.evaluations() * once))


def scales_of(study: SamplingStudy, way: Way) -> int:
    """At how many scales of guidance a way is sampled."""
    return len(study.guidance) if way.sampler == study.sampler else 1


def count_cells(study: SamplingStudy, model: Model) -> int:
    """How many records a model comes to."""
    return len(study.seeds) * sum(scales_of(study, way) for way in model.ways)


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
