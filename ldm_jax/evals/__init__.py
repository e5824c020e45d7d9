"""Evaluation: prompts, what frozen networks see in a model's samples of them, and the scores that come of it.

`METRICS` has a row a score. Where the settings name none, a run has all whose networks, prompts and reference it has.
"""

from collections.abc import Callable

from ldm_jax.evals.faithfulness import faithfulness, questions
from ldm_jax.evals.prompts import Prompts
from ldm_jax.evals.scores import Distance, Metric, OfImages, OfSets, Others, Seen, Set, Values
from ldm_jax.metrics.clip_score import clip_score, clip_score_x100
from ldm_jax.metrics.estimate import share_estimate
from ldm_jax.metrics.expansion import Expansion
from ldm_jax.metrics.frechet import expand_frechet, frechet, plug_in_frechet
from ldm_jax.metrics.inception_score import expand_inception_score, inception_score
from ldm_jax.metrics.kernel import Kernel, cmmd, expand_mmd, gaussian, kid, polynomial
from ldm_jax.metrics.precision_recall import precision_recall
from ldm_jax.metrics.r_precision import r_precision


def _lacks_texts(prompts: Prompts) -> str:
    return "" if all(prompts.texts) else "a prompt for every image"


def _lacks_distinct(prompts: Prompts) -> str:
    # CLIP reads neither capitals nor more than one space.
    distinct = len({" ".join(text.lower().split()) for text in prompts.texts})
    few = not all(prompts.texts) or distinct < max(len(prompts.texts), 2)
    return "two prompts or more that all differ" if few else ""


def _lacks_scenes(prompts: Prompts) -> str:
    return "" if prompts.scenes else "prompts that describe scenes (scenes:PRESET)"


def _of_pairs(name: str, score: Callable[[Set, Set], Values]) -> OfImages:
    """Of each image and its prompt, in CLIP's space."""
    return OfImages(
        "clip", lambda seen, prompts: {name: score(seen["image"], seen["text"])}, _lacks_texts
    )


def _r_precision(seen: Seen, prompts: Prompts) -> dict[str, Values]:
    return {"clip_r_precision": r_precision(seen["image"], seen["text"])}


def _faithfulness(seen: Seen, prompts: Prompts) -> dict[str, Values]:
    asked = [questions(scene, number) for number, scene in enumerate(prompts.scenes)]
    return faithfulness(seen["logits"], asked)


def _as_stored(extractor: str, name: str) -> OfImages:
    """What the extractor itself makes of an image and the one that it should be."""
    return OfImages(extractor, lambda seen, prompts: {name: seen[name]})


def _frechet(name: str, extractor: str) -> OfSets:
    return OfSets(
        extractor,
        (name,),
        lambda *sets: [frechet(*sets)],
        expand=expand_frechet,
        least=lambda width: 2 * width + 2,
    )


def _plug_in(name: str, extractor: str) -> OfSets:
    return OfSets(
        extractor,
        (name,),
        lambda *sets: [plug_in_frechet(*sets)],
        expand=expand_frechet,
        least=lambda width: width + 1,
    )


def _kernel(name: str, extractor: str, distance: Distance, kernel: Kernel) -> OfSets:
    def expand(images: Set, reference: Others) -> Expansion:
        return expand_mmd(images, reference, kernel)

    return OfSets(extractor, (name,), lambda *sets: [distance(*sets)], expand=expand)


METRICS: dict[str, Metric] = {
    "clip_score": _of_pairs("clip_score", clip_score),
    "clip_score_x100": _of_pairs("clip_score_x100", clip_score_x100),
    "clip_r_precision": OfImages("clip", _r_precision, _lacks_distinct, share_estimate),
    "faithfulness": OfImages("reader", _faithfulness, _lacks_scenes),
    "fid": _frechet("fid", "inception"),
    "clean_fid": _frechet("clean_fid", "inception_clean"),
    "fid_plug_in": _plug_in("fid_plug_in", "inception"),
    "clean_fid_plug_in": _plug_in("clean_fid_plug_in", "inception_clean"),
    "fd_clip": _frechet("fd_clip", "clip"),
    "fd_dinov2": _frechet("fd_dinov2", "dinov2"),
    "kid": _kernel("kid", "inception", kid, polynomial),
    "clean_kid": _kernel("clean_kid", "inception_clean", kid, polynomial),
    "kid_clip": _kernel("kid_clip", "clip", kid, polynomial),
    "kid_dinov2": _kernel("kid_dinov2", "dinov2", kid, polynomial),
    "cmmd": _kernel("cmmd", "clip", cmmd, gaussian),
    "inception_score": OfSets(
        "inception",
        ("inception_score",),
        lambda logits: [inception_score(logits)],
        expand=expand_inception_score,
        reads="logits",
        compared=False,
    ),
    "precision_recall": OfSets(
        "inception", ("precision", "recall"), precision_recall, least=lambda width: 8
    ),
    "psnr": _as_stored("pairs", "psnr"),
    "ssim": _as_stored("pairs", "ssim"),
    "lpips": _as_stored("lpips", "lpips"),
}

LOWER_IS_BETTER = frozenset(
    (
        *(
            name
            for name, metric in METRICS.items()
            if isinstance(metric, OfSets) and metric.compared
        ),
        "lpips",
    )
) - {"precision_recall"}
