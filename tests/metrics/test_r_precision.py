"""R-precision against its closed forms on random features, and by hand."""

import numpy as np
import pytest
from scipy import special, stats

from ldm_jax.metrics.r_precision import drawn, r_precision


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def related(noise, count=150, width=12):
    """Prompts, and images that lie near them."""
    rng = np.random.default_rng(0)
    text = unit(rng.normal(size=(count, width)))
    return unit(text + noise * rng.normal(size=text.shape)), text


@pytest.mark.parametrize(("count", "candidates"), [(3000, 100), (2000, 10), (500, 2)])
def test_images_that_have_nothing_to_do_with_their_prompts_score_at_chance(count, candidates):
    image, text = unit(np.random.default_rng(0).normal(size=(2, count, 16)))
    hits = r_precision(image, text, candidates=candidates)
    assert set(hits) <= {0.0, 1.0}
    chance = 1 / candidates
    error = np.sqrt(chance * (1 - chance) / count)
    assert hits.mean() == pytest.approx(chance, abs=3.5 * error)


def test_images_that_are_their_prompts_all_hit():
    _, text = related(0)
    np.testing.assert_array_equal(r_precision(text, text), 1)
    np.testing.assert_array_equal(r_precision(-text, text), 0)


def test_three_images_are_judged_by_hand():
    text = np.eye(3)
    # Nearest to its own prompt, nearest to another one, as near to its own as to another one.
    image = np.array([[0.8, 0.6, 0.0], [0.8, 0.6, 0.0], [0.6, 0.5, 0.6]])
    np.testing.assert_array_equal(r_precision(image, text), [1, 0, 0])


def test_a_tie_that_float32_may_break_is_a_miss():
    image, text = related(0.1, width=5)
    text = np.concatenate([text, text * np.array([[1 + 1e-7]])])
    hits = r_precision(np.concatenate([image, image]), text, candidates=300)
    np.testing.assert_array_equal(hits, 0)


def test_among_all_prompts_the_nearest_is_the_largest_cosine_in_any_order():
    image, text = related(0.5)
    hits = r_precision(image, text, candidates=1000)
    np.testing.assert_array_equal(hits, np.argmax(image @ text.T, axis=1) == np.arange(150))
    assert 0.2 < hits.mean() < 0.9
    order = np.random.default_rng(1).permutation(150)
    np.testing.assert_array_equal(
        r_precision(image[order], text[order], candidates=150), hits[order]
    )


def test_the_mean_over_draws_is_that_of_all_draws():
    image, text = related(0.7)
    cosines = image @ text.T
    nearer = np.sum(cosines > np.diag(cosines)[:, None], axis=1)
    # No one of the nearer prompts is among the 9 that are drawn of 149.
    expected = special.comb(149 - nearer, 9) / special.comb(149, 9)
    hits = np.array([r_precision(image, text, candidates=10, seed=seed) for seed in range(200)])
    errors = np.sqrt(expected * (1 - expected) / 200)
    assert 0.3 < expected.mean() < 0.9
    np.testing.assert_allclose(hits.mean(axis=0), expected, atol=4 * errors.max())
    error = np.sqrt(np.sum(errors**2)) / 150
    assert hits.mean() == pytest.approx(expected.mean(), abs=3.5 * error)


def test_draws_are_of_others_without_repetition_and_take_all_alike():
    others = drawn(400, 100, seed=0)
    assert others.shape == (400, 99)
    for number, row in enumerate(others):
        assert number not in row and len(set(row)) == 99 and 0 <= row.min() <= row.max() < 400
    times = np.bincount(others.ravel(), minlength=400)
    expected, variance = 99, 399 * (99 / 399) * (300 / 399)
    assert stats.chi2.sf(np.sum((times - expected) ** 2) / variance, 400) > 1e-3


def test_draws_hang_on_the_seed_alone():
    np.testing.assert_array_equal(drawn(60, 20, seed=3), drawn(60, 20, seed=3))
    assert (drawn(60, 20, seed=3) != drawn(60, 20, seed=4)).any()
    np.testing.assert_array_equal(np.sort(drawn(4, 100, seed=0)[2]), [0, 1, 3])


def test_a_feature_that_is_no_number_is_not_left_out():
    image, text = related(0.1)
    image[4, 0] = np.nan
    hits = r_precision(image, text)
    assert np.flatnonzero(np.isnan(hits)).tolist() == [4]


def test_fewer_than_two_are_refused():
    with pytest.raises(ValueError, match=r"1 prompts and 100 candidates; .* two or more of both"):
        r_precision(np.eye(1), np.eye(1))
    with pytest.raises(ValueError, match="3 prompts and 1 candidates"):
        r_precision(np.eye(3), np.eye(3), candidates=1)
