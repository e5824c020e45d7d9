"""The scores of a run: which it can have, the features that they are made of, and the reference set."""

import collections
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath
from tqdm import tqdm

from ldm_jax.data import open_source
from ldm_jax.data.sources import provenance
from ldm_jax.evals import METRICS
from ldm_jax.evals.evaluator import View, Viewer
from ldm_jax.evals.networks import NEED_OTHERS, embedded_on_foreign
from ldm_jax.evals.prompts import Prompts
from ldm_jax.evals.references import Reference, SourceImages, Truth, provenance_of
from ldm_jax.evals.scores import Metric, OfImages, OfSets, Scores
from ldm_jax.metrics.extractors import EXTRACTORS, TOKENS, TRUTH, Extractor
from ldm_jax.models import weights
from ldm_jax.parallel import distributed
from ldm_jax.runs.pretrained import ScoringNetworks
from ldm_jax.runs.run import Run
from ldm_jax.settings.schema import to_json
from ldm_jax.types import Images, SomeImages

_log = logging.getLogger(__name__)


class Scoring(NamedTuple):
    """The feature extractors for a prompt set, the metrics computed from them, and the reference set, if any."""

    viewer: Viewer
    scores: Scores
    reference: Reference | None


def make_scoring(run: Run, prompts: Prompts, truth: Truth | Images | None = None) -> Scoring:
    """Makes the scores of `eval.metrics`, or all that can be had: the reasons against the others are logged.

    `truth` are the images that those drawn should be.

    Raises:
      ValueError: a score that is named cannot be had.
    """
    reference = make_reference(run)
    known = reference.features if reference else {}
    chosen, reasons = {}, collections.defaultdict(list)
    for name in run.config.eval.metrics or METRICS:
        reason = _lacking(METRICS[name], run.scorers, prompts, known, truth)
        if not reason:
            chosen[name] = METRICS[name]
        elif run.config.eval.metrics:
            raise ValueError(f"eval.metrics names {name}, which needs {reason}")
        else:
            reasons[reason].append(name)
    for reason, names in reasons.items():
        _log.info("Skipped metrics (missing %s): %s.", reason, ", ".join(names))
    extractors = dict.fromkeys(metric.extractor for metric in chosen.values())
    if foreign := embedded_on_foreign(json.loads(to_json(run.config))):
        _log.warning(NEED_OTHERS, ", ".join(foreign))
    views = {name: _view(name, run.scorers, prompts, truth) for name in extractors}
    viewer = Viewer(views, mesh=run.mesh, batch=run.config.sampling.batch)
    return Scoring(viewer, Scores(chosen, prompts, known), reference)


def _view(
    name: str, networks: ScoringNetworks, prompts: Prompts, truth: Truth | Images | None
) -> View:
    """An extractor beside what it reads by image: tokens of its network's own tokenizer, true images, or nothing."""
    row, read = EXTRACTORS[name], None
    if row.reads == TOKENS:
        read = networks[row.network].tokenizer(list(prompts.texts))
    elif row.reads == TRUTH:
        read = truth
    return View(make_extractor(name, networks), row.network, read)


def make_extractor(name: str, networks: ScoringNetworks) -> Extractor:
    """Makes the extractor of a row of `EXTRACTORS` from the network that the row names."""
    row = EXTRACTORS[name]
    network = networks[row.network] if row.network else None
    return row.kind.of(network and network.config, network and network.apply)


def _lacking(
    metric: Metric,
    networks: ScoringNetworks,
    prompts: Prompts,
    reference: Mapping[str, Any],
    truth: Truth | Images | None,
) -> str:
    """What a score needs and is not there, if anything."""
    row, count = EXTRACTORS[metric.extractor], len(prompts.texts)
    if row.network and row.network not in networks:
        return f"the network {row.network} (eval.networks.{row.network} names its directory)"
    if row.reads == TRUTH and truth is None:
        return "the images that these should be"
    if isinstance(metric, OfImages):
        return metric.lacks(prompts)
    if metric.compared and metric.extractor not in reference:
        return f"features of {metric.extractor} of a reference (eval.reference)"
    if not metric.compared:
        return ""
    images = reference[metric.extractor][metric.reads]
    least, fewest = metric.least(images.shape[1]), min(count, len(images))
    if fewest < least:
        return (
            f"{least} images here and in the reference for features of {images.shape[1]} dimensions, and one of them"
            f" has {fewest}; kernel distances (kid) serve fewer"
        )
    return ""


def make_reference(run: Run) -> Reference | None:
    """Reads the features that `eval.reference` names, or computes those of its images and keeps them in the run.

    Raises:
      ValueError: they are of another network or size of images, or of no image.
      FileNotFoundError: no such file.
    """
    spec = run.config.eval.reference
    if spec is None:
        return None
    identities = {name: identity(name, run.scorers) for name in compared(run.scorers)}
    path = epath.Path(spec)
    if not spec.endswith(".npz"):
        facts = provenance(open_source(spec)), run.config.data.size, sorted(identities.items())
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        path = run.workdir / "references" / f"{digest}.npz"
        if not distributed.agreed(path.exists()):
            found = measure(run, spec)
            if distributed.is_first():
                found.write(path)
            return found
    reference = Reference.read(path)
    reference.require(spec, size=run.config.data.size, extractors=identities)
    return reference


def compared(networks: ScoringNetworks) -> list[str]:
    """Names the extractors that scores of sets compare features of, where their network is there."""
    kinds = (metric for metric in METRICS.values() if isinstance(metric, OfSets))
    names = dict.fromkeys(metric.extractor for metric in kinds if metric.compared)
    return [name for name in names if EXTRACTORS[name].network in networks]


def measure(run: Run, spec: str) -> Reference:
    """Computes the features of all images of a source that sets are compared by, and shows its progress.

    Raises ValueError where the run has no network that scores of sets are made of.
    """
    config, networks = run.config, run.scorers
    if not (names := compared(networks)):
        raise ValueError(
            f"there is no network that scores of sets are made of: {config.pretrained} has none, and"
            " eval.networks gives none of clip, inception and dinov2"
        )
    source, size, batch = open_source(spec), config.data.size, config.sampling.batch
    images = SourceImages(source, size=size, batch=batch, workers=config.data.workers)
    views = {name: View(make_extractor(name, networks), EXTRACTORS[name].network) for name in names}
    frozen = {name: network.params for name, network in networks.items()}
    with tqdm(total=len(source), unit=" images", disable=not distributed.is_first()) as bar:
        bar.set_description("reference")
        features = Viewer(views, mesh=run.mesh, batch=batch)(frozen, _shown(images, bar))
    identities = {name: identity(name, networks) for name in names}
    return Reference(features, provenance_of(source, images, size=size, extractors=identities))


def write_reference(run: Run, spec: str, output: epath.Path) -> str:
    """Writes the features of all images of a source to a file and returns a summary. Raises as `measure`."""
    found = measure(run, spec)
    if distributed.is_first():
        found.write(output)
    facts = found.provenance
    widths = ", ".join(
        f"{name} {by_name['image'].shape[1]}" for name, by_name in found.features.items()
    )
    return (
        f"{output}: {facts.count} images of {facts.size} pixels, {facts.skipped} skipped; {widths}"
    )


def identity(name: str, networks: ScoringNetworks) -> tuple[str, str]:
    """Returns what features of an extractor depend on: its network's weights and config, and its preprocessing."""
    row = EXTRACTORS[name]
    if not row.network:
        return "", row.kind.preprocessing
    network = networks[row.network]
    facts = f"{weights.fingerprint(network.params)} {network.config}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16], row.kind.preprocessing


def _shown(images: Iterable[SomeImages], bar: tqdm) -> Iterator[SomeImages]:
    for part in images:
        yield part
        bar.update(len(part))
