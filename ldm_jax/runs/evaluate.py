"""Evaluation of a trained model, or of given images, on prompts: evaluations on disk, tables, comparisons, a page."""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ldm_jax.data import open_source
from ldm_jax.data.sources import Skip, Source, provenance
from ldm_jax.diffusion import SAMPLERS
from ldm_jax.evals.cells import Cell, check_comparable, read_cell
from ldm_jax.evals.evaluator import Part
from ldm_jax.evals.pairing import pair_by_name
from ldm_jax.evals.prompt_sets import cleaned
from ldm_jax.evals.prompts import Prompts
from ldm_jax.evals.references import SourceImages, Truth
from ldm_jax.evals.session import (
    Session,
    Work,
    compared,
    evaluated,
    over_runs,
    over_seeds,
    seeds_of,
)
from ldm_jax.files.durable import write_atomically
from ldm_jax.metrics.paired import Paired
from ldm_jax.metrics.resize import to_pixels
from ldm_jax.models import weights
from ldm_jax.pages.evaluation import evaluation_page
from ldm_jax.parallel import distributed
from ldm_jax.runs.config import SamplingConfig, absolute_location
from ldm_jax.runs.run import Run
from ldm_jax.runs.scoring import Scoring, identity, make_scoring
from ldm_jax.runs.validation import make_validation
from ldm_jax.settings.command_line import UsageError, in_words
from ldm_jax.settings.fields import IMAGES, PARAMETERS
from ldm_jax.settings.paths import home_path
from ldm_jax.settings.schema import decisive, to_json
from ldm_jax.settings.values import flag, list_of, names_of, seeds
from ldm_jax.types import Params, Pixels

PAGE = "evaluation.html"


@dataclasses.dataclass(frozen=True)
class Request:
    """The evaluations that are wanted: combinations of sampling settings, or given images, and comparisons of them.

    Raises UsageError for settings that contradict each other.
    """

    samplers: Sequence[str] = flag(
        (),
        f"samplers to compare, of {', '.join(SAMPLERS)} (default: the run's)",
        type=names_of("sampler", SAMPLERS),
        metavar="A,B",
    )
    steps: Sequence[int] = flag(
        (), "numbers of sampling steps (default: the run's)", type=list_of(int), metavar="N,M"
    )
    guidance: Sequence[float] = flag(
        (), "scales of guidance (default: the run's)", type=list_of(float), metavar="X,Y"
    )
    seeds: Sequence[int] = flag(
        (),
        "seeds of the noise, one image per prompt of each (default 0)",
        type=seeds,
        metavar="N,M",
    )
    images: str | None = flag(
        None,
        "score these images, not a model's: folder:PATH or another source, with captions as prompts",
        type=in_words(absolute_location),
        metavar="SOURCE",
    )
    truth: str | None = flag(
        None,
        "with --images: the images that they should be, paired by name (1.png is 001.png)",
        type=in_words(absolute_location),
        metavar="SOURCE",
    )
    against: str | None = flag(
        None,
        "an evaluation to test against: its directory, RUN/evaluated/NAME",
        type=in_words(home_path),
        metavar="DIRECTORY",
    )
    over: Sequence[str] = flag(
        (),
        "evaluations of runs of other seeds: the mean of all, whose interval holds for other seeds",
        type=in_words(lambda text: [home_path(path) for path in text.split(",")]),
        metavar="DIRECTORY,...",
    )
    keep: bool = flag(
        False,
        "write every image into its evaluation's directory, with its prompt in metadata.jsonl",
        action="store_true",
    )

    def __post_init__(self) -> None:
        of_models = ("samplers", "steps", "guidance", "seeds", "over", "keep")
        given = [name for name in of_models if getattr(self, name)]
        if self.images and given:
            raise UsageError(
                f"--{given[0]} cannot be combined with --images, which scores existing images"
            )
        if self.truth and not self.images:
            raise UsageError(
                "--truth is given without --images, the images to compare with it: give both"
            )


def evaluate(run: Run, request: Request) -> Iterator[str]:
    """Makes every evaluation that is not there; yields tables of the scores, on the first of several processes.

    Raises:
      ValueError: none of the scores can be had, or `against` or `over` cannot be compared with.
      FileNotFoundError: no checkpoint, or no such evaluation.
    """
    session, works = (of_images if request.images else of_model)(run, request)
    if not session.scores.metrics:
        raise ValueError(
            "none of the scores can be had; the lines above say what each of them needs"
        )
    cells = {Cell(run.workdir, work.label, work.facts): work for work in works}
    check_others(cells, request)
    lines = [evaluated(session, work, cell) for cell, work in cells.items()]
    if not distributed.is_first():
        return
    for line in [*lines, *(over_seeds(session, group) for group in seeds_of(cells))]:
        yield table(line)
    for cell in cells if request.over else ():
        yield table(over_runs(session, cell, request.over))
    for cell in cells if request.against else ():
        found = compared(session, cell, request.against)
        yield "\n".join([f"{cell.name} less {request.against}", *differences(found)])
    page = run.workdir / PAGE
    write_atomically(page, evaluation_page(run.workdir).encode())
    yield f"{len(session.scores.prompts.texts)} prompts; all evaluations in {page}"


def check_others(cells: Mapping[Cell, Work], request: Request) -> None:
    """Checks `against` and `over` before anything is drawn. Raises as `read_cell` and `check_comparable`."""
    over = [str(epath.Path(path)) for path in request.over]
    own = {str(cell.path) for cell in cells}
    if len({*over, *own}) < len(over) + len(own):
        raise ValueError("--over names an evaluation twice, or this one; each run counts once")
    for path, more in ((request.against, ()), *((path, ("sampling",)) for path in over)):
        for cell in cells if path else ():
            facts = read_cell(path)[1]
            check_comparable(cell.facts, facts, *more)
            if path == request.against and cell.facts["noise"] != facts["noise"]:
                logging.warning(
                    "%s and %s use different noise, so images are paired by prompt only.",
                    *(cell.name, path),
                )


def of_model(run: Run, request: Request) -> tuple[Session, list[Work]]:
    """Plans every combination of samplers, steps, guidance and seeds of the newest checkpoint."""
    model = Model(run)
    works = [
        work
        for sampling in samplings(run.config.sampling, request.samplers, request.steps)
        for work in model.works(
            sampling, request.guidance or [sampling.guidance], request.seeds or [0]
        )
    ]
    return session_of(run, model.scoring, model.validate(), request.keep), works


class Model:
    """The newest checkpoint of a run, ready to be sampled and scored.

    Attributes:
      run, params, scoring: the run, the parameters that `eval.weights` names, and its scores.
      facts: what features depend on, but for sampling settings.
    """

    def __init__(self, run: Run) -> None:
        """Loads the model. Raises as `Run.weights` and `make_scoring`."""
        examples, self.params = run.weights()
        self.run, self.scoring = run, make_scoring(run, run.prompts)
        model = {"examples": examples, "weights": run.config.eval.weights}
        model |= identity_of(run, self.params)
        self.facts = facts_of(run, model, run.config.eval.prompts, self.scoring)

    def works(
        self, sampling: SamplingConfig, scales: Sequence[float], seeds: Sequence[int]
    ) -> list[Work]:
        """Plans an evaluation for each scale of guidance and seed; all of them run one program."""
        run = self.run.sampled_by(sampling)
        evaluator = run.evaluator(self.scoring.viewer)
        works = []
        for guidance, seed in itertools.product(scales, seeds):
            facts = sampling_facts(sampling, guidance) | {"noise": [run.config.seed, seed]}
            args = self.params, run.frozen.params, guidance
            drawn = functools.partial(evaluator.parts, *args, seed=seed)
            again = functools.partial(evaluator.images_of, *args, seed=seed)
            works.append(Work(label(facts), self.facts | facts, drawn, again))
        return works

    def validate(self) -> dict[str, float]:
        """Computes the validation losses; {} where the config wants none."""
        return make_validation(self.run)(self.params, self.run.frozen.params)


def identity_of(run: Run, params: Params) -> dict[str, Any]:
    """Returns what decides a model's images, but for sampling: a digest of all weights and of how they are used."""
    images, parameters = decisive(run.config, IMAGES), decisive(run.config, PARAMETERS)
    facts = {path: value for path, value in images.items() if path in parameters}
    del facts["pretrained"]  # the networks count, and not where they lie
    prints = [
        weights.fingerprint(each)
        for each in (params, run.frozen.autoencoder.params, run.frozen.text_params)
    ]
    text = json.dumps([facts, prints], sort_keys=True)
    return {"identity": hashlib.sha256(text.encode()).hexdigest()[:16]}


def of_images(run: Run, request: Request) -> tuple[Session, list[Work]]:
    """Plans the evaluation of images of a source with their captions, and with those that they should be, if given."""
    source = open_source(request.images)
    truth = read_truth(run, source, request.truth) if request.truth else None
    scoring = make_scoring(run, prompts_of(source), truth)
    frozen = {name: network.params for name, network in run.scorers.items()}
    facts = facts_of(run, provenance(source), request.images, scoring)
    facts |= {"truth": truth and provenance(open_source(request.truth)) | truth.described}

    def parts(start: int, kept: int) -> Iterator[tuple[int, Part]]:
        images = exact_images(run, source, start)
        for first, features in scoring.viewer.parts(frozen, images, start):
            yield first, Part(features)

    def some(numbers: Sequence[int]) -> Pixels:
        return np.asarray(to_pixels(exact_images(run, source).rows(numbers)))

    work = Work("images", facts | {"sampling": {}, "noise": []}, parts, some)
    return session_of(run, scoring, {}, keep=False), [work]


def session_of(run: Run, scoring: Scoring, validation: Mapping[str, float], keep: bool) -> Session:
    """Makes what all evaluations of one call share."""
    measured, reference = run.config.eval, scoring.reference
    told = {
        "reference": measured.reference,
        "reference_digest": reference.digest if reference else None,
        "validated_by": [measured.validation, *measured.levels],
        "config": json.loads(to_json(run.config)),
    }
    return Session(run.workdir, scoring.scores, validation, measured.shown, keep, told)


def exact_images(run: Run, source: Source, start: int = 0) -> SourceImages:
    """Opens the images of a source that belong to prompts, from number `start` on."""
    config = run.config
    size, batch, workers = config.data.size, config.sampling.batch, config.data.workers
    return SourceImages(source, size=size, batch=batch, workers=workers, exact=True, start=start)


def read_truth(run: Run, source: Source, spec: str) -> Truth:
    """Opens the images that those of `source` should be. Raises ValueError where they are not as many, or others."""
    truth = open_source(spec)
    if len(truth) != len(source):
        raise ValueError(f"--truth has {len(truth)} images, and --images has {len(source)}")
    keys = ([key for key, _ in read_captions(each)] for each in (source, truth))
    return Truth(exact_images(run, truth), pair_by_name(*keys))


def prompts_of(source: Source) -> Prompts:
    """The main captions of a source, "" where an image has none. Raises ValueError for an item that cannot be read."""
    texts = tuple(text for _, text in read_captions(source))
    return Prompts(texts, ("",) * len(texts))


def read_captions(source: Source) -> Iterator[tuple[str, str]]:
    """Yields the key and the main caption of every item. Raises as `prompts_of`."""
    for number in range(len(source)):
        key = f"item {number}"
        try:
            key, _, captions = source[number]
            yield key, cleaned(captions[0]) if captions else ""
        except Skip as skip:
            raise ValueError(f"{skip.key or key}: {skip.reason}") from skip
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error


def facts_of(run: Run, model: Mapping[str, Any], spec: str, scoring: Scoring) -> dict[str, Any]:
    """Returns what decides features, but for sampling settings."""
    prompts = scoring.scores.prompts
    extractors = {metric.extractor for metric in scoring.scores.metrics.values()}
    return {
        "model": dict(model),
        "prompts": {"spec": spec, "digest": prompts.digest, "count": len(prompts.texts)},
        "networks": {name: identity(name, run.scorers) for name in sorted(extractors)},
    }


def samplings(
    sampling: SamplingConfig,
    samplers: Sequence[str],
    steps: Sequence[int],
    guidance: Sequence[float] = (),
) -> Iterator[SamplingConfig]:
    """Yields the settings for each combination of what is named; the run's own sampler keeps its settings."""
    own = sampling.sampler
    named = [own if type(own) is SAMPLERS[name] else SAMPLERS[name]() for name in samplers]
    grid = named or [own], steps or [sampling.steps], guidance or [sampling.guidance]
    for sampler, number, scale in itertools.product(*grid):
        yield dataclasses.replace(sampling, sampler=sampler, steps=number, guidance=scale)


def sampling_facts(sampling: SamplingConfig, guidance: float) -> dict[str, Any]:
    """How images are drawn; their number at a time decides nothing."""
    facts = json.loads(to_json(sampling)) | {"guidance": guidance}
    del facts["batch"]
    return {"sampling": facts}


def label(facts: Mapping[str, Any]) -> str:
    """What an evaluation is called, but for the digest of its facts."""
    sampling, (_, seed) = facts["sampling"], facts["noise"]
    name, steps = sampling["sampler"]["name"], sampling["steps"]
    return f"{name}-{steps}-g{sampling['guidance']:g}-s{seed}"


def table(line: Mapping[str, Any]) -> str:
    """One score a line, with its 95% interval and the number of images behind it."""
    rows = [line["cell"]]
    for name, score in line["scores"].items():
        value, low, high, count = score
        rows.append(f"{name:<28} {value:8.4f}   [{low:.4f}, {high:.4f}]   n={count}")
    for level, loss in line["validation"].items():
        rows.append(f"{f'validation loss at {level}':<28} {loss:8.4f}")
    if line.get("drawn"):
        rate = line["images_per_second"]
        rows.append(f"{line['drawn']} images, {rate:.1f} a second on {line['chips']}")
    return "\n".join(rows)


def differences(found: Mapping[str, Paired]) -> Iterator[str]:
    """One difference a line, with its 95% interval and the p of no difference."""
    for name, ((value, low, high, _), p) in found.items():
        yield f"{name:<28} {value:+8.4f}   [{low:+.4f}, {high:+.4f}]   p={p:.4f}"
