"""Which scores a run has, what looks at its images for them, and what they are compared with."""

import collections
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from ldm_jax.data import open_source
from ldm_jax.data.sources import provenance
from ldm_jax.evals import METRICS
from ldm_jax.evals.evaluator import View, Viewer
from ldm_jax.evals.prompts import Prompts
from ldm_jax.evals.references import Reference, SourceImages, Truth, provenance_of
from ldm_jax.evals.scores import Metric, OfImages, OfSets, Scores
from ldm_jax.metrics.extractors import EXTRACTORS, TOKENS, TRUTH, Extractor
from ldm_jax.models import weights
from ldm_jax.models.tokenizer import Tokenizer
from ldm_jax.parallel import distributed
from ldm_jax.runs.config import RunConfig
from ldm_jax.runs.pretrained import Network
from ldm_jax.types import Images, SomeImages

_log = logging.getLogger(__name__)


class Scoring(NamedTuple):
    """What looks at images of a prompt set, and what comes of its features."""

    viewer: Viewer
    scores: Scores


def make_scoring(
    config: RunConfig,
    prompts: Prompts,
    networks: Mapping[str, Network],
    tokenizer: Tokenizer | None,
    mesh: Mesh,
    *,
    reference: Reference | None = None,
    truth: Truth | Images | None = None,
) -> Scoring:
    """The scores of `eval.metrics`, or all that can be had: of what is not, the reason is logged.

    `networks` and `tokenizer` are what `load_scoring` gives; `truth` are the images that those drawn should be.

    Raises:
      ValueError: a score that is named cannot be had.
    """
    read = {TOKENS: tokenizer(list(prompts.texts)) if tokenizer else None, TRUTH: truth}
    known = reference.features if reference else {}
    chosen, reasons = {}, collections.defaultdict(list)
    for name in config.eval.metrics or METRICS:
        reason = _lacking(METRICS[name], networks, prompts, known, truth)
        if not reason:
            chosen[name] = METRICS[name]
        elif config.eval.metrics:
            raise ValueError(f"eval.metrics names {name}, which needs {reason}")
        else:
            reasons[reason].append(name)
    for reason, names in reasons.items():
        _log.info("Not scored for want of %s: %s.", reason, ", ".join(names))
    views = {}
    for name in dict.fromkeys(metric.extractor for metric in chosen.values()):
        extractor = make_extractor(name, networks)
        views[name] = View(extractor, EXTRACTORS[name].network, read.get(EXTRACTORS[name].reads))
    viewer = Viewer(views, mesh=mesh, batch=config.sampling.batch)
    return Scoring(viewer, Scores(chosen, prompts, known))


def make_extractor(name: str, networks: Mapping[str, Network]) -> Extractor:
    """A row of `EXTRACTORS`, of the network that it names."""
    row = EXTRACTORS[name]
    network = networks[row.network] if row.network else None
    return row.kind.of(network and network.config, network and network.apply)


def _lacking(
    metric: Metric,
    networks: Mapping[str, Network],
    prompts: Prompts,
    reference: Mapping[str, Any],
    truth: Truth | Images | None,
) -> str:
    """What a score needs and is not there, if anything."""
    row, count = EXTRACTORS[metric.extractor], len(prompts.texts)
    if row.network and row.network not in networks:
        return f"the network {row.network} (eval.{row.network} names its directory)"
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


def make_reference(
    config: RunConfig, workdir: epath.PathLike, networks: Mapping[str, Network], mesh: Mesh
) -> Reference | None:
    """The features that `eval.reference` names: of its file, or of its images, and then kept in WORKDIR/references.

    Raises:
      ValueError: they are of another network or size of images, or of no image.
      FileNotFoundError: no such file.
    """
    spec = config.eval.reference
    if spec is None:
        return None
    names = compared(networks)
    identities = {name: identity(name, networks) for name in names}
    path = epath.Path(spec)
    if not spec.endswith(".npz"):
        facts = repr((provenance(open_source(spec)), config.data.size, sorted(identities.items())))
        digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
        path = epath.Path(workdir) / "references" / f"{digest}.npz"
        if not distributed.agreed(path.exists()):
            found = measure(config, spec, networks, names, mesh)
            if distributed.is_first():
                found.write(path)
            return found
    reference = Reference.read(path)
    reference.require(spec, size=config.data.size, extractors=identities)
    return reference


def compared(networks: Mapping[str, Network]) -> list[str]:
    """The extractors whose features sets are compared by, of those whose network is there."""
    kinds = (metric for metric in METRICS.values() if isinstance(metric, OfSets))
    names = dict.fromkeys(metric.extractor for metric in kinds if metric.compared)
    return [name for name in names if EXTRACTORS[name].network in networks]


def measure(
    config: RunConfig, spec: str, networks: Mapping[str, Network], names: Sequence[str], mesh: Mesh
) -> Reference:
    """Features of all images of a source, by the extractors of these names; it shows its progress."""
    source, size = open_source(spec), config.data.size
    batch = config.sampling.batch
    images = SourceImages(source, size=size, batch=batch, workers=config.data.workers)
    views = {name: View(make_extractor(name, networks), EXTRACTORS[name].network) for name in names}
    frozen = {name: network.params for name, network in networks.items()}
    with tqdm(total=len(source), unit=" images", disable=not distributed.is_first()) as bar:
        bar.set_description("reference")
        features = Viewer(views, mesh=mesh, batch=batch)(frozen, _shown(images, bar))
    identities = {name: identity(name, networks) for name in names}
    return Reference(features, provenance_of(source, images, size=size, extractors=identities))


def identity(name: str, networks: Mapping[str, Network]) -> tuple[str, str]:
    """What features of an extractor depend on: its network, weights and config, and what is done to images before."""
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
