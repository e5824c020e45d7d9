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
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_jax.data import open_source
from ldm_jax.data.sources import Skip, Source, provenance
from ldm_jax.diffusion import SAMPLERS
from ldm_jax.evals.cells import DIRECTORY, Cell, check_comparable, read_cell
from ldm_jax.evals.evaluator import Part
from ldm_jax.evals.prompt_sets import cleaned
from ldm_jax.evals.prompts import Prompts
from ldm_jax.evals.references import Reference, SourceImages, Truth
from ldm_jax.evals.session import (
    Session,
    Work,
    compared,
    evaluated,
    over_runs,
    over_seeds,
    seeds_of,
)
from ldm_jax.files.durable import alone_in, write_atomically
from ldm_jax.metrics.paired import Paired
from ldm_jax.metrics.resize import to_pixels
from ldm_jax.models import weights
from ldm_jax.models.text import warn_of_truncation
from ldm_jax.nn.functional import Functional
from ldm_jax.pages.evaluation import evaluation_page
from ldm_jax.parallel import distributed, make_mesh
from ldm_jax.runs import build
from ldm_jax.runs.config import RunConfig, SamplingConfig, absolute_location
from ldm_jax.runs.pretrained import Pretrained, load_pretrained, load_scoring
from ldm_jax.runs.scoring import Scoring, identity, make_reference, make_scoring
from ldm_jax.settings.command_line import UsageError, in_words, run_command
from ldm_jax.settings.fields import IMAGES, PARAMETERS
from ldm_jax.settings.paths import home_path
from ldm_jax.settings.ranges import check_seed
from ldm_jax.settings.schema import decisive, to_json
from ldm_jax.types import Params, Pixels

PAGE = "evaluation.html"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    distributed.add_flags(parser)
    text = f"samplers to compare, of {', '.join(SAMPLERS)} (default: the run's)"
    parser.add_argument("--samplers", type=_names, metavar="A,B", help=text)
    text = "numbers of sampling steps (default: the run's)"
    parser.add_argument("--steps", type=_list(int), metavar="N,M", help=text)
    text = "scales of guidance (default: the run's)"
    parser.add_argument("--guidance", type=_list(float), metavar="X,Y", help=text)
    text = "seeds of the noise, an image a prompt of each (default 0)"
    parser.add_argument("--seeds", type=_seeds, metavar="N,M", help=text)
    text = "look at these images, not at a model's: folder:PATH or another source, with captions as prompts"
    parser.add_argument("--images", type=in_words(absolute_location), metavar="SOURCE", help=text)
    text = "with --images: those that they should be, in the same order"
    parser.add_argument("--truth", type=in_words(absolute_location), metavar="SOURCE", help=text)
    text = "an evaluation to test against: its directory, RUN/evaluated/NAME"
    parser.add_argument("--against", type=in_words(home_path), metavar="DIRECTORY", help=text)
    text = (
        "evaluations of runs of other seeds: the mean of all, whose interval holds for other seeds"
    )
    parser.add_argument("--over", type=_directories, metavar="DIRECTORY,...", help=text)
    text = "write every image into its evaluation's directory, with its prompt in metadata.jsonl"
    parser.add_argument("--keep", action="store_true", help=text)


def main(flags: argparse.Namespace) -> None:
    """Evaluates, and says what came of it."""
    of_models = ("samplers", "steps", "guidance", "seeds", "over", "keep")
    given = [name for name in of_models if getattr(flags, name)]
    if flags.images and given:
        raise UsageError(f"--{given[0]} is for a model's images, and --images gives others")
    if flags.truth and not flags.images:
        raise UsageError("--truth goes with --images")
    with distributed.joined(flags):
        flags.workdir.mkdir(parents=True, exist_ok=True)
        directory = flags.workdir / DIRECTORY
        directory.mkdir(exist_ok=True)
        with alone_in(directory) if distributed.is_first() else contextlib.nullcontext():
            run(flags.config, flags.workdir, flags)


def run(config: RunConfig, workdir: epath.Path, flags: argparse.Namespace) -> None:
    """Makes every evaluation that is not there; of several processes the first one writes and says it."""
    mesh = make_mesh(config.mesh)
    session, works = (of_images if flags.images else of_model)(config, workdir, flags, mesh)
    if not session.scores.metrics:
        raise ValueError(
            "none of the scores can be had; the lines above say what each of them needs"
        )
    cells = {Cell(workdir, work.label, work.facts): work for work in works}
    check_others(cells, flags)
    lines = [evaluated(session, work, cell) for cell, work in cells.items()]
    if not distributed.is_first():
        return
    for line in [*lines, *(over_seeds(session, group) for group in seeds_of(cells))]:
        print(table(line), end="\n\n")
    for cell in cells if flags.over else ():
        print(table(over_runs(session, cell, flags.over)), end="\n\n")
    for cell in cells if flags.against else ():
        found = compared(session, cell, flags.against)
        print(f"{cell.name} less {flags.against}", *differences(found), sep="\n", end="\n\n")
    page = workdir / PAGE
    write_atomically(page, evaluation_page(workdir).encode())
    print(f"{len(session.scores.prompts.texts)} prompts; all evaluations in {page}")


def check_others(cells: Mapping[Cell, Work], flags: argparse.Namespace) -> None:
    """Before anything is drawn: whether --against and --over can be had. Raises as `read_cell`, `check_comparable`."""
    over = [str(epath.Path(path)) for path in flags.over or ()]
    own = {str(cell.path) for cell in cells}
    if len({*over, *own}) < len(over) + len(own):
        raise ValueError("--over names an evaluation twice, or this one; each run counts once")
    for path, more in ((flags.against, ()), *((path, ("sampling",)) for path in over)):
        for cell in cells if path else ():
            facts = read_cell(path)[1]
            check_comparable(cell.facts, facts, *more)
            if path == flags.against and cell.facts["noise"] != facts["noise"]:
                logging.warning(
                    "%s and %s are of other noise: pairs share prompts alone.", cell.name, path
                )


def of_model(
    config: RunConfig, workdir: epath.Path, flags: argparse.Namespace, mesh: Mesh
) -> tuple[Session, list[Work]]:
    """Every combination of samplers, steps, guidance and seeds of the newest checkpoint."""
    model = open_model(config, workdir, mesh)
    works = [
        work
        for sampling in samplings(config.sampling, flags)
        for work in model.works(sampling, flags.guidance or [sampling.guidance], flags.seeds or [0])
    ]
    args = config, workdir, model.scoring, model.validate(), flags, model.reference
    return session_of(*args), works


class Opened(NamedTuple):
    """A trained model, ready to be sampled and scored."""

    config: RunConfig
    workdir: epath.Path
    network: Functional
    params: Params
    pretrained: Pretrained
    prompts: Prompts
    scoring: Scoring
    reference: Reference | None
    facts: dict[str, Any]  # what decides features, but for how they are sampled

    def works(
        self, sampling: SamplingConfig, scales: Sequence[float], seeds: Sequence[int]
    ) -> list[Work]:
        """An evaluation for each scale of guidance and seed; all of them are runs of one program."""
        own = dataclasses.replace(self.config, sampling=sampling)
        viewer, frozen = self.scoring.viewer, self.pretrained.params
        evaluator = build.make_evaluator(own, self.prompts, self.network, self.pretrained, viewer)
        works = []
        for guidance, seed in itertools.product(scales, seeds):
            facts = sampling_facts(sampling, guidance) | {"noise": [self.config.seed, seed]}
            args = self.params, frozen, guidance
            drawn = functools.partial(evaluator.parts, *args, seed=seed)
            again = functools.partial(evaluator.images_of, *args, seed=seed)
            works.append(Work(label(facts), self.facts | facts, drawn, again))
        return works

    def validate(self) -> dict[str, float]:
        """The validation losses, where the config wants some."""
        args = self.config, self.workdir, self.network, self.pretrained, self.scoring.viewer.mesh
        return build.make_validation(*args)(self.params, self.pretrained.params)


def open_model(config: RunConfig, workdir: epath.Path, mesh: Mesh) -> Opened:
    """The newest checkpoint of a run, and what its images are scored by. Raises as `load_weights`, `make_scoring`."""
    pretrained = load_pretrained(config, mesh)
    network = build.make_backbone(config, pretrained)
    examples, params = build.load_weights(config, workdir, network, pretrained, mesh)
    prompts = build.make_prompts(config, workdir)
    warn_of_truncation([*prompts.texts, config.sampling.negative], pretrained.text)
    networks, tokenizer = pretrained.scoring, pretrained.clip_tokenizer
    reference = make_reference(config, workdir, networks, mesh)
    scoring = make_scoring(config, prompts, networks, tokenizer, mesh, reference=reference)
    model = {"examples": examples, "weights": config.eval.weights}
    model |= identity_of(config, params, pretrained)
    facts = facts_of(model, config.eval.prompts, prompts, scoring, networks)
    return Opened(config, workdir, network, params, pretrained, prompts, scoring, reference, facts)


def identity_of(config: RunConfig, params: Params, pretrained: Pretrained) -> dict[str, Any]:
    """What decides a model's images, beside how they are sampled: a digest of all weights and of how they are used."""
    facts, trained = decisive(config, IMAGES), decisive(config, PARAMETERS)
    facts = {path: value for path, value in facts.items() if path in trained}
    del facts["pretrained"]  # the networks count, and not where they lie
    frozen = (pretrained.autoencoder.params, pretrained.text_params)
    prints = [weights.fingerprint(each) for each in (params, *frozen)]
    text = json.dumps([facts, prints], sort_keys=True)
    return {"identity": hashlib.sha256(text.encode()).hexdigest()[:16]}


def of_images(
    config: RunConfig, workdir: epath.Path, flags: argparse.Namespace, mesh: Mesh
) -> tuple[Session, list[Work]]:
    """Images of a source with their captions, and those that they should be, if these are given."""
    source = open_source(flags.images)
    networks, tokenizer = load_scoring(config, mesh)
    reference = make_reference(config, workdir, networks, mesh)
    truth = read_truth(config, source, flags.truth) if flags.truth else None
    prompts = prompts_of(source)
    scoring = make_scoring(
        config, prompts, networks, tokenizer, mesh, reference=reference, truth=truth
    )
    frozen = {name: network.params for name, network in networks.items()}
    facts = facts_of(provenance(source), flags.images, prompts, scoring, networks)
    facts |= {"truth": flags.truth and provenance(open_source(flags.truth))}

    def parts(start: int, kept: int) -> Iterator[tuple[int, Part]]:
        images = exact_images(config, source, start)
        for first, features in scoring.viewer.parts(frozen, images, start):
            yield first, Part(features)

    def some(numbers: Sequence[int]) -> Pixels:
        return np.asarray(to_pixels(exact_images(config, source).rows(numbers)))

    work = Work("images", facts | {"sampling": {}, "noise": []}, parts, some)
    return session_of(config, workdir, scoring, {}, flags, reference), [work]


def session_of(
    config: RunConfig,
    workdir: epath.Path,
    scoring: Scoring,
    validation: Mapping[str, float],
    flags: argparse.Namespace,
    reference: Reference | None,
) -> Session:
    """What all evaluations of this call share."""
    told = {
        "reference": config.eval.reference,
        "reference_digest": reference.digest if reference else None,
        "validated_by": [config.eval.validation, *config.eval.levels],
        "config": json.loads(to_json(config)),
    }
    return Session(workdir, scoring.scores, validation, config.eval.shown, flags.keep, told)


def exact_images(config: RunConfig, source: Source, start: int = 0) -> SourceImages:
    """The images of a source that belong to prompts, from one on."""
    size, batch, workers = config.data.size, config.sampling.batch, config.data.workers
    return SourceImages(source, size=size, batch=batch, workers=workers, exact=True, start=start)


def read_truth(config: RunConfig, source: Source, spec: str) -> Truth:
    """The images that those of `source` should be. Raises ValueError where they are not as many."""
    truth = open_source(spec)
    if len(truth) != len(source):
        raise ValueError(f"--truth has {len(truth)} images, and --images has {len(source)}")
    return Truth(exact_images(config, truth))


def prompts_of(source: Source) -> Prompts:
    """The main captions of a source, "" where an image has none. Raises ValueError for an item that cannot be read."""
    texts = []
    for number in range(len(source)):
        key = f"item {number}"
        try:
            key, _, captions = source[number]
            texts.append(cleaned(captions[0]) if captions else "")
        except Skip as skip:
            raise ValueError(f"{skip.key or key}: {skip.reason}") from skip
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return Prompts(tuple(texts), ("",) * len(texts))


def facts_of(
    model: Mapping[str, Any],
    spec: str,
    prompts: Prompts,
    scoring: Scoring,
    networks: Mapping[str, Any],
) -> dict[str, Any]:
    """What decides features, but for how they are sampled."""
    extractors = {metric.extractor for metric in scoring.scores.metrics.values()}
    return {
        "model": dict(model),
        "prompts": {"spec": spec, "digest": prompts.digest, "count": len(prompts.texts)},
        "networks": {name: identity(name, networks) for name in sorted(extractors)},
    }


def samplings(sampling: Any, flags: argparse.Namespace) -> Iterator[Any]:
    """The settings of sampling for each sampler and number of steps that the flags name."""
    own = sampling.sampler
    named = [
        own if isinstance(own, SAMPLERS[name]) else SAMPLERS[name]()
        for name in flags.samplers or ()
    ]
    for sampler, steps in itertools.product(named or [own], flags.steps or [sampling.steps]):
        yield dataclasses.replace(sampling, sampler=sampler, steps=steps)


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


def _list(kind: type) -> Callable[[str], list[Any]]:
    """A parser of values with commas between them, each once; argparse makes a sentence of what it raises."""

    def parse(text: str) -> list[Any]:
        try:
            return list(dict.fromkeys(kind(part) for part in text.split(",")))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no list of {'whole ' if kind is int else ''}numbers with commas between them"
            ) from None

    return parse


@in_words
def _seeds(text: str) -> list[int]:
    return [check_seed(seed, "a seed") for seed in _list(int)(text)]


@in_words
def _directories(text: str) -> list[str]:
    return [home_path(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SAMPLERS]:
        raise argparse.ArgumentTypeError(
            f"there is no sampler {unknown[0]!r}; there are {', '.join(SAMPLERS)}"
        )
    return names


if __name__ == "__main__":
    run_command(main, RunConfig, description=__doc__, add_flags=add_flags)
