"""KID and CMMD against their formulas, torch-fidelity, clean-fid, and simulation."""

import numpy as np
import pytest
from sets import peer, two_sets

from ldm_jax.metrics import kernel
from ldm_jax.metrics.kernel import (
    biased_cmmd,
    cmmd,
    expand_mmd,
    gaussian,
    kid,
    kid_of_subsets,
    polynomial,
)


def unit_sets():
    return [each / np.linalg.norm(each, axis=1, keepdims=True) for each in two_sets()]


def off_diagonal_mean(matrix):
    count = len(matrix)
    return (matrix.sum() - np.trace(matrix)) / (count * (count - 1))


def test_it_is_the_formula_over_all_pairs():
    x, y = two_sets()
    xx, yy, xy = ((1 + a @ b.T / 24) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    expected = off_diagonal_mean(xx) + off_diagonal_mean(yy) - 2 * xy.mean()
    assert kid(x, y).value == pytest.approx(expected, rel=1e-9)
    assert kid(x, y).count == 300


def test_cmmd_is_its_formula_with_and_without_the_pairs_of_a_sample_with_itself():
    x, y = unit_sets()
    xx, yy, xy = (
        1000 * np.exp(-np.sum((a[:, None] - b[None, :]) ** 2, axis=-1) / 200)
        for a, b in ((x, x), (y, y), (x, y))
    )
    printed = xx.mean() + yy.mean() - 2 * xy.mean()
    assert biased_cmmd(x, y) == pytest.approx(printed, rel=1e-9)
    unbiased = off_diagonal_mean(xx) + off_diagonal_mean(yy) - 2 * xy.mean()
    assert cmmd(x, y).value == pytest.approx(unbiased, rel=1e-9)
    assert expand_mmd(x, y, gaussian).bias == pytest.approx(printed - unbiased, rel=1e-9)


def test_blocks_change_nothing(monkeypatch):
    x, y = two_sets()
    whole = expand_mmd(x, y, polynomial)
    monkeypatch.setattr(kernel, "BLOCK", 1000)
    parts = expand_mmd(x, y, polynomial)
    assert parts.value == pytest.approx(whole.value, rel=1e-9)
    assert parts.second == pytest.approx(whole.second, rel=1e-9)
    for part, each in zip(parts.influences, whole.influences, strict=True):
        np.testing.assert_allclose(part, each, atol=1e-9)


def test_it_depends_neither_on_order_nor_on_rotation():
    x, y = two_sets()
    rng = np.random.default_rng(1)
    axes = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    shuffled = kid(x[rng.permutation(300)] @ axes, y[rng.permutation(400)] @ axes)
    np.testing.assert_allclose(shuffled, kid(x, y), rtol=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_it_is_unbiased(shift):
    rng = np.random.default_rng(2)
    # Points drawn from two lists of points: their distance is a sum over the lists.
    x, y = rng.normal(size=(40, 3)), rng.normal(size=(40, 3))
    y = x + shift * y
    xx, yy, xy = (polynomial(*pair).mean() for pair in ((x, x), (y, y), (x, y)))
    truth = xx + yy - 2 * xy
    draws = [kid(rng.choice(x, 12), rng.choice(y, 20)).value for _ in range(1000)]
    assert abs(np.mean(draws) - truth) < 3.5 * np.std(draws) / np.sqrt(1000)
    assert truth == pytest.approx(0, abs=1e-12) if shift == 0 else truth > 0.1


@pytest.mark.parametrize(("shift", "too_wide"), [(0.0, 1.3), (0.5, 1.1)])
def test_the_interval_has_the_width_of_the_scatter(shift, too_wide):
    rng = np.random.default_rng(3)
    draws = [kid(rng.normal(size=(60, 8)), shift + rng.normal(size=(90, 8))) for _ in range(500)]
    scatter = np.std([each.value for each in draws])
    width = np.mean([(each.high - each.low) / 3.92 for each in draws])
    assert 0.9 < width / scatter < too_wide


def test_what_cannot_be_scored_is_said():
    x, y = two_sets()
    with pytest.raises(ValueError, match=r"sets of 1 and 400 samples; .* needs two of each"):
        kid(x[:1], y)
    with pytest.raises(ValueError, match="subsets of 1000 from sets of 300 and 400 samples"):
        kid_of_subsets(x, y)
    x[3] = np.nan
    with pytest.raises(ValueError, match=r"1 of 300 samples are NaN or infinite.* at index 3"):
        kid(x, y)


def test_subsets_give_what_torch_fidelity_prints():
    # metric_kid.kid_features_to_metric of torch-fidelity 0.4.0 on `two_sets()`, 10 subsets of 100.
    given = kid_of_subsets(*two_sets(), subsets=10, size=100)
    np.testing.assert_allclose(given, (0.12002080325849174, 0.04956678812766226), rtol=1e-9)


def test_it_is_what_torch_fidelity_and_clean_fid_answer_now():
    theirs = peer("torch_fidelity.metric_kid")
    import torch

    x, y = two_sets()
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    answer = theirs.kid_features_to_metric(
        *tensors, kid_subsets=7, kid_subset_size=90, rng_seed=5, verbose=False
    )
    expected = [answer[f"kernel_inception_distance_{name}"] for name in ("mean", "std")]
    given = kid_of_subsets(x, y, subsets=7, size=90, seed=5)
    np.testing.assert_allclose(given, expected, rtol=1e-9)
    # Of sets of one size, clean-fid's largest subset is all samples.
    clean = peer("cleanfid.fid").kernel_distance(x, y[:300], num_subsets=1, max_subset_size=300)
    assert kid(x, y[:300]).value == pytest.approx(clean, rel=1e-9)
