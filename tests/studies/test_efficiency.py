"""On records of known truth: the best guidance, the costs, and verdicts that are right where the data decides."""

import itertools
import sys

import numpy as np
import pytest

from ldm_jax.studies.efficiency import (
    curves,
    groups,
    incomplete,
    pairs,
    smaller_is_better,
    whatever_the_sampler,
)
from ldm_jax.studies.records import SamplingRecord
from ldm_jax.studies.verdicts import Verdict
from ldm_jax.types import Estimate

SIZES = {"small": 1.0, "medium": 4.0, "large": 16.0}  # cost of a pass
STEPS, RATES, SEEDS = (4, 8, 16), (1.0, 3.0, 7.0), (0, 1)


def smaller_wins(size, steps):
    """What decides is the cost: log2 of it lifts all alike, and size takes from that."""
    return 0.05 * np.log2(size * steps) - 0.1 * np.log2(size)


def larger_wins(size, steps):
    return 0.05 * np.log2(size * steps) + 0.1 * np.log2(size)


def all_alike(size, steps):
    """Neither size nor steps matter."""
    return 0.0


def record(model, sampler, steps, guidance, seed, values, **fields):
    size = SIZES[model]
    return SamplingRecord(
        **{"study": "s", "grid": "g", "commit": "c", "chips": "cpu x 1", "examples": 10, **fields},
        **{"model": model, "params": int(1000 * size), "sampler": sampler, "steps": steps},
        **{"guidance": guidance, "seed": seed, "cost": size * steps, "flops": 2 * size * steps},
        seconds=size * steps if seed else None,
        scores={"score": Estimate(float(np.mean(values)), 0.0, 1.0, len(values))},
        values={"score": list(values)},
    )


def cost_alone(size, steps):
    """At equal cost all models are alike, and none of them was sampled at just the cost of another."""
    return 0.05 * np.log2(size * steps)


def smaller_wins_by_little(size, steps):
    return cost_alone(size, steps) - 0.02 * np.log2(size)


def study(truth, *, samplers=("ddim",), prompts=64, noise=0.2, seed=0, sign=1, steps=STEPS):
    """Records whose means are `truth`, less for guidance the farther it is from 3; noise is by prompt and image."""
    rng = np.random.default_rng(seed)
    prompt = rng.normal(0, noise, prompts)
    found = []
    for sampler, model, taken, rate, s in itertools.product(samplers, SIZES, steps, RATES, SEEDS):
        mean = truth(SIZES[model], taken) - 0.02 * abs(rate - 3)
        values = sign * (mean + prompt + rng.normal(0, noise, prompts))
        found.append(record(model, sampler, taken, rate, s, values))
    return found


@pytest.mark.parametrize(
    ("truth", "verdict"),
    [(smaller_wins, Verdict.CONFIRMED), (larger_wins, Verdict.REFUTED)],
)
@pytest.mark.parametrize("lower_is_better", [False, True])
def test_verdict_is_right_where_the_truth_is_clear(truth, verdict, lower_is_better):
    records = study(truth, sign=-1 if lower_is_better else 1)
    (curve,) = curves(records, "score", lower_is_better=lower_is_better)
    finding = smaller_is_better(curve)
    assert finding.verdict is verdict
    assert finding.wins.value == (1.0 if verdict is Verdict.CONFIRMED else 0.0)
    assert finding.wins.count == len(pairs(curve))


def test_models_that_are_alike_are_not_decided_but_for_a_rare_false_alarm():
    found = [
        smaller_is_better(curves(study(all_alike, seed=seed, prompts=32), "score")[0]).verdict
        for seed in range(60)
    ]
    assert found.count(Verdict.UNDECIDED) >= 0.9 * len(found)


def test_too_few_prompts_decide_nothing_and_more_of_them_do():
    weak = lambda size, steps: 0.2 * smaller_wins(size, steps)  # noqa: E731
    few, many = (
        smaller_is_better(curves(study(weak, prompts=n, noise=0.5), "score")[0]) for n in (4, 4000)
    )
    assert few.verdict is Verdict.UNDECIDED
    assert many.verdict is Verdict.CONFIRMED


def test_finding_4_is_of_all_samplers():
    both = study(smaller_wins, samplers=("ddim", "heun"))
    against = study(larger_wins, samplers=("ddpm",))
    alike = study(all_alike, samplers=("lcm",))

    def verdict(records):
        return whatever_the_sampler([smaller_is_better(x) for x in curves(records, "score")])

    assert verdict(both) is Verdict.CONFIRMED
    assert verdict(both + against) is Verdict.REFUTED
    assert verdict(both + alike) is Verdict.UNDECIDED
    assert verdict(both + alike + against) is Verdict.REFUTED


def test_best_guidance_is_the_true_one_and_so_is_the_score():
    (curve,) = curves(study(smaller_wins, noise=0.01), "score")
    assert np.all(curve.guidance == 3)
    truth = [smaller_wins(SIZES[curve.models[model]], steps) for model, steps in curve.points]
    np.testing.assert_allclose(curve.scores[0], truth, atol=0.01)


def test_intervals_hold_their_rate_over_prompts_and_seeds():
    # One point, one scale: the bootstrap over prompts, whose seeds go together, against simulated truth.
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        prompt = rng.normal(0.0, 1, 50)
        cells = [record("small", "ddim", 4, 1.0, s, prompt + rng.normal(0, 1, 50)) for s in SEEDS]
        (estimate,) = curves(cells, "score")[0].estimates()
        covered += estimate.low <= 0 <= estimate.high
    assert 0.90 <= covered / 200 <= 0.985  # of 0.95, four standard errors


@pytest.fixture
def uneven(monkeypatch):
    """Sizes whose costs never meet."""
    monkeypatch.setattr(sys.modules[__name__], "SIZES", {"a": 1.0, "b": 1.8, "c": 3.1, "d": 5.5})
    return (1, 2, 4, 8, 16)


def test_models_that_only_cost_tells_apart_are_not_decided(uneven):
    found = [
        smaller_is_better(curves(study(cost_alone, seed=seed, steps=uneven), "score")[0]).verdict
        for seed in range(40)
    ]
    assert found.count(Verdict.UNDECIDED) >= 0.9 * len(found)


def test_a_small_advantage_at_equal_cost_is_confirmed_by_many_prompts(uneven):
    records = study(smaller_wins_by_little, prompts=1000, steps=uneven)
    finding = smaller_is_better(curves(records, "score")[0])
    assert finding.verdict is Verdict.CONFIRMED
    assert finding.wins.value > 0.95


def test_pairs_are_at_equal_cost_and_at_few_steps():
    (curve,) = curves(study(smaller_wins), "score")
    found = pairs(curve, few=8)
    # small@4 to @16 costs 4 to 16, medium 16 to 64, large 64 to 256.
    assert {(pair.smaller, pair.larger) for pair in found} == {(0, (1, 4)), (1, (2, 4))}
    for pair in found:
        same = curve.points.index((pair.smaller, 16))
        difference = curve.scores[:, same] - curve.scores[:, curve.points.index(pair.larger)]
        np.testing.assert_allclose(pair.advantage, difference, atol=1e-12)


def test_scores_between_points_are_interpolated_in_the_logarithm_of_cost(uneven):
    (curve,) = curves(study(cost_alone, noise=1e-9, steps=uneven), "score")
    assert len(pairs(curve)) > 10
    for pair in pairs(curve):
        np.testing.assert_allclose(pair.advantage, 0, atol=1e-6)


def test_finding_4_is_rarely_refuted_where_all_models_are_alike():
    samplers, refuted = ("ddim", "ddpm", "heun", "lcm", "euler", "dpmpp"), 0
    for seed in range(40):
        records = study(all_alike, samplers=samplers, prompts=32, seed=seed)
        found = [smaller_is_better(curve) for curve in curves(records, "score")]
        refuted += whatever_the_sampler(found) is Verdict.REFUTED
    assert refuted <= 4


def test_records_of_other_grids_and_commits_are_kept_apart():
    ours = study(smaller_wins)
    other = [record("small", "ddim", 4, 1.0, 0, [1.0], commit="d")]
    apart = groups(ours + other)
    assert list(apart) == [("s", "g", "c"), ("s", "g", "d")]
    assert list(groups(ours + other + ours[:1]))[-1] == ("s", "g", "c")
    with pytest.raises(ValueError, match="several grids or commits"):
        curves(ours + other, "score")


def test_a_point_without_all_its_cells_is_left_out_and_named():
    records = study(smaller_wins)[:-1]
    assert incomplete(records) == ["large, ddim, 16 steps"]
    (curve,) = curves(records, "score")
    assert (2, 16) not in curve.points
    assert len(curve.points) == 8
    assert incomplete(study(smaller_wins)) == []


def test_prompts_of_which_nothing_is_asked_do_not_count():
    values = [1.0, float("nan"), 3.0]
    (curve,) = curves([record("small", "ddim", 4, 1.0, s, values) for s in SEEDS], "score")
    assert curve.scores[0, 0] == 2.0
    assert curve.seconds.tolist() == [4.0]


def test_unknown_score_is_said():
    records = [record("small", "ddim", 4, 1.0, 0, [1.0, 2.0])]
    with pytest.raises(ValueError, match="no score 'fid' by prompt; they have score"):
        curves(records, "fid")


def test_where_nothing_can_be_compared_nothing_is_decided():
    one = curves([record("small", "ddim", 4, 1.0, 0, [1.0, 2.0])], "score")
    finding = smaller_is_better(one[0])
    assert finding.verdict is Verdict.UNDECIDED
    assert finding.wins.count == 0
