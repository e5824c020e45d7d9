"""Intervals and paired tests against their stated rates, in draws from populations whose scores are known."""

import numpy as np
import pytest
from scipy import special, stats

from ldm_jax.metrics.estimate import mean_estimate, share_estimate
from ldm_jax.metrics.frechet import Moments, expand_frechet, frechet
from ldm_jax.metrics.inception_score import inception_score
from ldm_jax.metrics.kernel import cmmd, expand_mmd, gaussian, kid, polynomial
from ldm_jax.metrics.paired import paired, paired_sets
from ldm_jax.metrics.precision_recall import precision_recall
from ldm_jax.metrics.r_precision import r_precision
from ldm_jax.metrics.seeds import over_prompts_and_seeds, over_seeds

REPEATS = 500
pytestmark = pytest.mark.slow


def tolerance(rate):
    """Three standard errors of a share over the repeats."""
    return 3 * np.sqrt(rate * (1 - rate) / REPEATS)


def coverage(draw, score, truth, seed=0):
    rng = np.random.default_rng(seed)
    estimates = [score(*draw(rng)) for _ in range(REPEATS)]
    return np.mean([estimate.low <= truth <= estimate.high for estimate in estimates])


def long_tailed(rng, count, scales):
    """Of mean 0 and variance `scales` squared: normal samples, each of another size."""
    sizes = np.sqrt(8 / rng.chisquare(10, size=(count, 1)))
    return rng.normal(size=(count, len(scales))) * sizes * scales[None]


def two_populations(width, difference):
    """A draw from two populations of long tails, and the distance of Gaussians along the same axes."""
    a = np.arange(1, width + 1) ** -0.5
    b = a * (1 + difference * np.sin(np.arange(width)))
    mean = difference * a
    truth = np.sum(mean**2) + np.sum((a - b) ** 2)
    return a, b, mean, truth


@pytest.mark.parametrize(
    ("width", "counts"),
    [(4, (200, 300)), (20, (200, 250))],
)
@pytest.mark.parametrize("known", [True, False])
def test_frechet_covers_the_distance_of_the_populations(width, counts, known):
    a, b, mean, truth = two_populations(width, 0.3)
    reference = Moments(np.zeros(width), np.diag(b**2), 1)

    def draw(rng):
        features = mean[None] + long_tailed(rng, counts[0], a)
        return features, reference if known else long_tailed(rng, counts[1], b)

    assert coverage(draw, frechet, truth) == pytest.approx(0.95, abs=tolerance(0.95))


@pytest.mark.parametrize(
    ("width", "counts"),
    [(4, (100, 150)), (40, (400, 500))],
)
def test_frechet_of_equal_populations_covers_zero(width, counts):
    a = two_populations(width, 0)[0]

    def draw(rng):
        return [long_tailed(rng, count, a) for count in counts]

    assert coverage(draw, frechet, 0) == pytest.approx(0.95, abs=tolerance(0.95))


def of_lists(score, kernel, scale):
    """A draw from two lists of points, whose distance is a sum over the lists."""
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(2, 60, 5))
    x, y = x / scale, (x + 0.4 * y + 0.2) / scale
    xx, yy, xy = (kernel(*pair).mean() for pair in ((x, x), (y, y), (x, y)))
    return lambda rng: (rng.choice(x, 80), rng.choice(y, 100)), score, xx + yy - 2 * xy


@pytest.mark.parametrize(
    ("score", "kernel", "scale"), [(kid, polynomial, 1.0), (cmmd, gaussian, 2.0)]
)
def test_kernel_distances_cover_those_of_the_populations(score, kernel, scale):
    given = of_lists(score, kernel, scale)
    assert coverage(*given) == pytest.approx(0.95, abs=tolerance(0.95))


@pytest.mark.parametrize(("score", "scale"), [(kid, 1.0), (cmmd, 2.0)])
def test_kernel_distances_of_equal_populations_cover_zero(score, scale):
    def draw(rng):
        return rng.normal(size=(60, 5)) / scale, rng.normal(size=(80, 5)) / scale

    assert coverage(draw, score, 0) == pytest.approx(0.95, abs=tolerance(0.95))


def test_the_inception_score_covers_that_of_the_population():
    population = 3 * np.random.default_rng(9).normal(size=(200, 10))
    p = special.softmax(population, axis=1)
    truth = np.exp(stats.entropy(p.mean(axis=0)) - stats.entropy(p, axis=1).mean())

    def draw(rng):
        return (rng.choice(population, 150),)

    covered = coverage(draw, inception_score, truth)
    assert covered == pytest.approx(0.95, abs=tolerance(0.95))


def test_the_mean_covers_that_of_the_population():
    def draw(rng):
        return (rng.beta(5, 2, size=100),)

    covered = coverage(draw, mean_estimate, 5 / 7)
    assert covered == pytest.approx(0.95, abs=tolerance(0.95))


# Shares near one, a share in the middle and one near one, and two in the middle in many dimensions.
@pytest.mark.parametrize(
    ("width", "counts", "scale"),
    [(2, (120, 160), 0.8), (16, (120, 160), 0.8), (64, (50, 60), 1.0)],
)
def test_precision_and_recall_cover_their_means_over_both_sets(width, counts, scale):
    rng = np.random.default_rng(0)
    n, m = counts
    found = [
        precision_recall(scale * rng.normal(size=(n, width)), rng.normal(size=(m, width)))
        for _ in range(REPEATS)
    ]
    for estimates in zip(*found, strict=True):
        value, low, high, count = np.transpose(estimates)
        truth, scatter = value.mean(), value.std()
        if count[0] * min(truth, 1 - truth) > 1:  # what Wilson's interval needs
            assert np.mean((low <= truth) & (truth <= high)) > 0.95 - tolerance(0.95)
        if 0.1 < truth < 0.9:  # nearer to an end no interval that covers is as narrow
            assert np.mean(high - low) / (2 * 1.96 * scatter) < 1.4


@pytest.mark.parametrize("noise", [0.5, 1.0, 3.0])
def test_shared_prompts_leave_r_precision_the_interval_of_a_share(noise):
    rng = np.random.default_rng(0)

    def draw():
        text = rng.normal(size=(2, 64, 8))
        image = text[0] + noise * text[1]
        pair = image, text[0]
        return [each / np.linalg.norm(each, axis=1, keepdims=True) for each in pair]

    estimates = [share_estimate(r_precision(*draw(), candidates=30)) for _ in range(REPEATS)]
    value, low, high, _ = np.transpose(estimates)
    truth = value.mean()
    covered = np.mean((low <= truth) & (truth <= high))
    assert 0.1 < truth < 0.99
    assert covered == pytest.approx(0.95, abs=tolerance(0.95))


# Variances of seeds, prompts and the rest.
RATIOS = [(0, 1, 1), (0, 0.1, 1), (0.05, 1, 1), (1, 1, 1), (1, 0, 0.1)]
LAWS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "skewed": lambda rng, shape: (rng.beta(5, 2, size=shape) - 5 / 7) / np.sqrt(10 / 392),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("prompts", [16, 64, 256])
@pytest.mark.parametrize("ratio", RATIOS)
def test_means_over_prompts_and_seeds_cover_that_of_all(law, seeds, prompts, ratio):
    of_seeds, of_prompts, of_rest = np.sqrt(ratio)
    shapes = (seeds, 1), (1, prompts), (seeds, prompts)

    def draw(rng):
        a, b, rest = (LAWS[law](rng, shape) for shape in shapes)
        return (of_seeds * a + of_prompts * b + of_rest * rest,)

    assert coverage(draw, over_prompts_and_seeds, 0) > 0.95 - tolerance(0.95)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("effect", [0.0, 0.3])
def test_shares_over_prompts_and_seeds_cover_that_of_all(seeds, effect):
    def odds(rng, count):
        return 2 + rng.normal(size=(1, count)) + effect * rng.normal(size=(seeds, 1))

    def draw(rng):
        return (1.0 * (rng.uniform(size=(seeds, 64)) < special.expit(odds(rng, 64))),)

    truth = special.expit(
        2 + np.sqrt(1 + effect**2) * stats.norm.ppf(np.linspace(0, 1, 9999)[1:-1])
    )
    assert coverage(draw, over_prompts_and_seeds, truth.mean()) > 0.95 - tolerance(0.95)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_gaps_over_prompts_and_seeds_cover_that_of_all(seeds):
    def draw(rng):
        shared, own = rng.normal(size=(seeds, 1)), 0.3 * rng.normal(size=(2, seeds, 1))
        noise = [rng.normal(size=(seeds, n)) + rng.normal(size=(1, n)) for n in (30, 50)]
        return [shared + a + b for a, b in zip(own, noise, strict=True)]

    assert coverage(draw, over_prompts_and_seeds, 0) > 0.95 - tolerance(0.95)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_mean_over_seeds_covers_that_of_all(seeds):
    covered = coverage(lambda rng: (rng.normal(size=seeds),), over_seeds, 0)
    assert covered == pytest.approx(0.95, abs=tolerance(0.95))


def alarms(test, draw):
    rng = np.random.default_rng(1)
    return np.mean([test(*draw(rng)).p <= 0.05 for _ in range(REPEATS)])


def test_the_paired_test_gives_as_many_false_alarms_as_it_says():
    def draw(rng):
        prompts = rng.exponential(size=20)
        return prompts + rng.exponential(size=20), prompts + rng.exponential(size=20)

    assert alarms(paired, draw) == pytest.approx(0.05, abs=tolerance(0.05))


@pytest.mark.parametrize("name", ["frechet", "kid"])
def test_the_paired_test_of_sets_gives_as_many_false_alarms_as_it_says(name):
    reference = np.random.default_rng(9).normal(size=(60, 3))
    expand = {
        "frechet": lambda features: expand_frechet(features, reference),
        "kid": lambda features: expand_mmd(features, reference, polynomial),
    }[name]

    def draw(rng):
        prompts = rng.normal(size=(25, 3))
        return prompts + rng.normal(size=(25, 3)), prompts + rng.normal(size=(25, 3))

    given = alarms(lambda a, b: paired_sets(expand, a, b), draw)
    assert given == pytest.approx(0.05, abs=tolerance(0.05))
