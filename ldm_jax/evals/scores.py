"""What a score is made of, and what comes of features: estimates, numbers by image, and tests between two runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ldm_jax.evals.features import Features
from ldm_jax.evals.prompts import Prompts
from ldm_jax.metrics.estimate import by_group, mean_estimate
from ldm_jax.metrics.expansion import Expansion
from ldm_jax.metrics.paired import Paired, paired, paired_sets
from ldm_jax.metrics.seeds import over_prompts_and_seeds, over_seeds
from ldm_jax.types import Estimate

Seen = Mapping[str, np.ndarray]  # features of one extractor, by name
Values = Float[np.ndarray, "n"]
Set = Float[np.ndarray, "n D"]
Others = Float[np.ndarray, "m D"]
Distance = Callable[[Set, Others], Estimate]


def _any_prompts(prompts: Prompts) -> str:
    return ""


class OfImages(NamedTuple):
    """A score that is a mean over images.

    `values(features, prompts)` gives a number an image, by name, NaN where nothing is asked of it; "name/part" is not
    given by group again. `lacks(prompts)` says what it needs and these prompts are not, if anything. `estimate` makes
    a score of the numbers.
    """

    extractor: str
    values: Callable[[Seen, Prompts], dict[str, Values]]
    lacks: Callable[[Prompts], str] = _any_prompts
    estimate: Callable[..., Estimate] = mean_estimate


class OfSets(NamedTuple):
    """A score of all images together, and of those of a reference where it is `compared`.

    `estimate(images[, reference])` is of the features called `reads`; `expand`, of the same, serves paired tests, where
    there is one. `least(D)` images are needed, of features of D dimensions.
    """

    extractor: str
    names: tuple[str, ...]
    estimate: Callable[..., Sequence[Estimate]]
    expand: Callable[..., Expansion] | None = None
    least: Callable[[int], int] = lambda width: 2
    reads: str = "image"
    compared: bool = True

    def sets(self, features: Seen, reference: Seen | None) -> tuple[Set, ...]:
        """What `estimate` and `expand` take."""
        return (features[self.reads], *([reference[self.reads]] if self.compared else []))


Metric = OfImages | OfSets


class Scores(NamedTuple):
    """The scores of a prompt set: rows of METRICS by name, and what they are against."""

    metrics: Mapping[str, Metric]
    prompts: Prompts
    reference: Mapping[str, Seen]  # features of the reference, by extractor

    def __call__(self, *features: Features) -> dict[str, Estimate]:
        """Every score of the images of one seed of sampling or of several, on the same prompts.

        Features that are not finite make scores of them NaN.
        """
        scores: dict[str, Estimate] = {}
        for metric in self.metrics.values():
            seen = [of_seed[metric.extractor] for of_seed in features]
            if isinstance(metric, OfImages):
                scores |= self._of_images(metric, seen)
            else:
                scores |= self._of_sets(metric, seen)
        return scores

    def over_runs(self, features: Sequence[Features]) -> dict[str, Estimate]:
        """Every score of runs of the same prompts that differ in their seed: intervals hold for other seeds, too."""
        scores: dict[str, Estimate] = {}
        by_run = [self.values(each) for each in features]
        groups = self.prompts.groups
        for name in by_run[0] if by_run else ():
            values = np.stack([of_run[name] for of_run in by_run])
            values = values[:, ~np.isnan(values[0])] if "/" in name else values
            rows = groups if "/" not in name else ()
            scores |= by_group(name, values, rows, estimate=over_prompts_and_seeds)
        of_sets = [self._sets_alone(each) for each in features]
        return scores | {
            name: over_seeds(np.array([each[name].value for each in of_sets]))
            for name in of_sets[0]
        }

    def _sets_alone(self, features: Features) -> dict[str, Estimate]:
        metrics = (metric for metric in self.metrics.values() if isinstance(metric, OfSets))
        found: dict[str, Estimate] = {}
        for metric in metrics:
            found |= self._of_sets(metric, [features[metric.extractor]])
        return found

    def values(self, features: Features) -> dict[str, Values]:
        """The scores of each image, of those that are means over images; NaN where nothing is asked of it."""
        found: dict[str, Values] = {}
        for metric in self.metrics.values():
            if isinstance(metric, OfImages):
                found |= metric.values(features[metric.extractor], self.prompts)
        return found

    def by_prompt(self, features: Features, scores: Mapping[str, Estimate]) -> dict[str, Values]:
        """Numbers by prompt whose mean is the score: those of images, and of sets to first order.

        A set's are its score, of `scores` of the same features, with each image's influence on it, so that to resample
        prompts is to average some of these. Scores of sets without an expansion have none.
        """
        found = self.values(features)
        for metric in self.metrics.values():
            if isinstance(metric, OfSets) and metric.expand is not None:
                reference = self.reference.get(metric.extractor)
                made = metric.expand(*metric.sets(features[metric.extractor], reference))
                # Not the expansion's own value: Fréchet distances are freed of bias in another way, too.
                found[metric.names[0]] = scores[metric.names[0]].value + made.influences[0]
        return found

    def paired(self, a: Features, b: Features) -> dict[str, Paired]:
        """Every score of the first images less that of the second, of the same prompts and noise, with its test."""
        found: dict[str, Paired] = {}
        for metric in self.metrics.values():
            x, y = a[metric.extractor], b[metric.extractor]
            if isinstance(metric, OfImages):
                of_x, of_y = (metric.values(each, self.prompts) for each in (x, y))
                for name in of_x:
                    asked = ~np.isnan(of_x[name])
                    found[name] = paired(of_x[name][asked], of_y[name][asked])
            elif metric.expand is not None:
                found[metric.names[0]] = self._paired_sets(metric, x, y)
        return found

    def _paired_sets(self, metric: OfSets, x: Seen, y: Seen) -> Paired:
        rest = metric.sets(x, self.reference.get(metric.extractor))[1:]
        return paired_sets(
            lambda each: metric.expand(each, *rest), x[metric.reads], y[metric.reads]
        )

    def _of_images(self, metric: OfImages, seen: list[Seen]) -> dict[str, Estimate]:
        broken = any(np.isnan(each).any() for of_seed in seen for each in of_seed.values())
        by_seed = [metric.values(each, self.prompts) for each in seen]
        # Noise is of one prompt and one seed: what seeds add is in the scatter of the prompts' means.
        made = metric.estimate if len(seen) == 1 else mean_estimate
        scores: dict[str, Estimate] = {}
        for name in by_seed[0]:
            values = np.mean([of_seed[name] for of_seed in by_seed], axis=0)
            if broken:
                scores[name] = unknown(len(values))
            elif "/" in name:
                scores[name] = made(values[~np.isnan(values)])
            else:
                scores |= by_group(name, values, self.prompts.groups, estimate=made)
        return scores

    def _of_sets(self, metric: OfSets, seen: list[Seen]) -> dict[str, Estimate]:
        if not all(np.isfinite(each[metric.reads]).all() for each in seen):
            return dict.fromkeys(metric.names, unknown(len(self.prompts.texts)))
        reference = self.reference.get(metric.extractor)
        rows = [metric.estimate(*metric.sets(each, reference)) for each in seen]
        by_name = zip(metric.names, zip(*rows, strict=True), strict=True)
        return {name: _together(row) for name, row in by_name}


def _together(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over seeds of sampling; prompts and reference are the same, so that its interval is no narrower."""
    value, low, high, _ = np.mean(estimates, axis=0).tolist()
    return Estimate(value, low, high, sum(each.count for each in estimates))


def unknown(count: Any) -> Estimate:
    """A score that cannot be had."""
    return Estimate(float("nan"), float("nan"), float("nan"), int(count))
