"""Every row of METRICS on features whose scores are known, and what seeds, runs and pairs make of them."""

import numpy as np
import pytest

from ldm_jax.evals import LOWER_IS_BETTER, METRICS, OfImages, OfSets
from ldm_jax.evals.faithfulness import OUTPUTS
from ldm_jax.evals.prompts import read_prompts
from ldm_jax.evals.scores import Scores
from ldm_jax.metrics.estimate import mean_estimate, share_estimate
from ldm_jax.metrics.extractors import EXTRACTORS
from ldm_jax.metrics.frechet import frechet, frechet_distance, moments
from ldm_jax.metrics.seeds import over_prompts_and_seeds, over_seeds

COUNT, WIDTH = 64, 4
PROMPTS = read_prompts(f"scenes:full?count={COUNT}", lambda count: ())


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def features(seed: int, shift: float = 0.0, count: int = COUNT) -> dict:
    """As extractors give them; `shift` moves all images alike."""
    rng = np.random.default_rng(seed)
    text = unit(np.random.default_rng(99).normal(size=(count, WIDTH)))

    def images():
        return (rng.normal(size=(count, WIDTH)) + shift).astype(np.float32)

    logits = {"logits": rng.normal(size=(count, 5)).astype(np.float32)}
    return {
        "clip": {"image": unit(images() + text), "text": text},
        "inception": {"image": images(), **logits},
        "inception_clean": {"image": images(), **logits},
        "dinov2": {"image": images()},
        "reader": {"logits": rng.normal(size=(count, OUTPUTS)).astype(np.float32)},
        "pairs": {name: rng.uniform(0.5, 1, count).astype(np.float32) for name in ("psnr", "ssim")},
        "lpips": {"lpips": rng.uniform(0, 0.5, count).astype(np.float32)},
    }


REFERENCE = features(7, count=100)


def scores(*names: str) -> Scores:
    return Scores({name: METRICS[name] for name in names or METRICS}, PROMPTS, REFERENCE)


def test_every_extractor_serves_a_score_and_every_score_has_its_extractor():
    assert {metric.extractor for metric in METRICS.values()} == set(EXTRACTORS) == set(features(0))


@pytest.mark.parametrize("name", METRICS)
def test_every_score_is_finite_within_its_interval_and_of_all_images(name):
    found = scores(name)(features(0))
    names = METRICS[name].names if isinstance(METRICS[name], OfSets) else (name,)
    for each in names:
        assert found[each].low <= found[each].value <= found[each].high
        assert found[each].count == (100 if each == "recall" else COUNT)


def test_scores_of_images_are_means_by_group_and_shares_have_theirs():
    given = features(0)
    found = scores("clip_score", "clip_r_precision", "faithfulness")(given)
    cosines = np.sum(given["clip"]["image"].astype(float) * given["clip"]["text"], axis=1)
    seen = np.array(PROMPTS.groups) == "seen"
    assert found["clip_score"] == mean_estimate(cosines)
    assert found["clip_score/seen"] == mean_estimate(cosines[seen])
    hits = scores("clip_r_precision").values(given)["clip_r_precision"]
    assert found["clip_r_precision"] == share_estimate(hits)
    asked = scores("faithfulness").values(given)["faithfulness/relation"]
    assert found["faithfulness/relation"] == mean_estimate(asked[~np.isnan(asked)])


def test_seeds_of_sampling_are_averaged_prompt_by_prompt_and_sets_share_their_reference():
    seeds = [features(seed) for seed in range(3)]
    together = scores("clip_score", "fd_dinov2")(*seeds)
    values = np.mean([scores("clip_score").values(each)["clip_score"] for each in seeds], axis=0)
    assert together["clip_score"] == mean_estimate(values)
    alone = [frechet(each["dinov2"]["image"], REFERENCE["dinov2"]["image"]) for each in seeds]
    expected = np.mean(alone, axis=0)
    np.testing.assert_allclose(together["fd_dinov2"][:3], expected[:3])
    assert together["fd_dinov2"].count == 3 * COUNT


def test_runs_of_several_seeds_have_intervals_for_other_seeds():
    runs = [features(seed, shift=seed / 10) for seed in range(3)]
    found = scores("clip_score", "kid").over_runs(runs)
    values = np.stack([scores("clip_score").values(each)["clip_score"] for each in runs])
    kids = [scores("kid")(each)["kid"].value for each in runs]
    assert found["clip_score"] == over_prompts_and_seeds(values)
    assert found["kid"] == over_seeds(np.array(kids))


def test_a_run_is_not_better_than_itself_and_a_shifted_one_is_worse():
    same = scores().paired(features(0), features(0))
    assert all(test.difference.value == 0 and test.p == 1 for test in same.values())
    names = [n for n, m in METRICS.items() if isinstance(m, OfImages) or m.expand]
    assert set(names) <= set(same)
    worse = scores("fid", "kid", "fd_dinov2").paired(features(0, shift=1.0), features(1))
    assert all(test.difference.low > 0 and test.p < 0.01 for test in worse.values())


def test_features_that_are_nan_make_their_scores_nan_and_no_others():
    broken = features(0)
    broken["clip"]["image"][3, 0] = np.nan
    found = scores("clip_score", "kid_clip", "kid")(broken)
    assert np.isnan([found["clip_score"].value, found["kid_clip"].value]).all()
    assert np.isfinite(found["kid"].value)


def test_distances_are_better_when_lower_and_all_else_when_higher():
    assert {"fid", "clean_fid", "fd_clip", "fd_dinov2", "kid", "cmmd", "lpips"} < LOWER_IS_BETTER
    higher = {"clip_score", "faithfulness", "inception_score", "precision_recall", "psnr", "ssim"}
    assert not LOWER_IS_BETTER & higher


def test_what_a_score_needs_of_prompts_is_said():
    plain = read_prompts("captions:2", lambda count: ["a cat", "A  Cat"])
    assert METRICS["clip_r_precision"].lacks(plain) == "two prompts or more that all differ"
    assert "scenes" in METRICS["faithfulness"].lacks(plain)
    assert METRICS["clip_score"].lacks(plain) == ""
    assert METRICS["clip_score"].lacks(plain._replace(texts=("a cat", ""))) != ""


def test_the_value_that_papers_print_has_the_bias_and_serves_fewer_images():
    given = features(0)
    found = scores("fid", "fid_plug_in")(given)
    plain = frechet_distance(*(moments(x["inception"]["image"]) for x in (given, REFERENCE)))
    assert found["fid_plug_in"].value == pytest.approx(plain)
    assert found["fid_plug_in"].value > found["fid"].value
    shift = found["fid_plug_in"].value - found["fid"].value
    np.testing.assert_allclose(np.subtract(found["fid_plug_in"][:3], shift), found["fid"][:3])
    few = {"inception": {"image": given["inception"]["image"][: WIDTH + 1]}}
    assert np.isnan(scores("fid_plug_in")(few)["fid_plug_in"].low)


@pytest.mark.parametrize("name", ["clip_score", "faithfulness", "kid", "fid", "cmmd"])
def test_numbers_by_prompt_average_to_the_score_and_foretell_it_without_a_prompt(name):
    """The score without prompt i is about the mean of the other numbers: influences are derivatives (von Mises)."""
    given = features(3, shift=0.5)
    found = scores(name)(given)
    numbers, value = scores(name).by_prompt(given, found)[name], found[name].value
    assert len(numbers) == COUNT
    np.testing.assert_allclose(numbers.mean(), value, rtol=1e-6)
    if not isinstance(METRICS[name], OfSets):
        return
    extractor, reads = METRICS[name].extractor, METRICS[name].reads
    without = [
        scores(name)({extractor: {reads: np.delete(given[extractor][reads], i, axis=0)}})[
            name
        ].value
        for i in range(COUNT)
    ]
    foretold = [np.delete(numbers, i).mean() for i in range(COUNT)]
    assert np.corrcoef(without, foretold)[0, 1] > 0.9
    assert np.std(foretold) == pytest.approx(np.std(without), rel=0.2)


def test_one_infinite_pair_makes_the_test_unknown_and_not_certain():
    infinite = features(0)
    infinite["pairs"]["psnr"][0] = np.inf
    found = scores("psnr").paired(infinite, features(0))
    assert np.isnan(found["psnr"].p)
