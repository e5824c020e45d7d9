"""Precision and recall against sets whose manifolds are plain to see, scipy's distances, and torch-fidelity."""

import numpy as np
import pytest
from scipy import spatial, stats
from sets import peer, two_sets

from ldm_jax.metrics import kernel
from ldm_jax.metrics.precision_recall import precision_recall, within


def values(features, reference, **kwargs):
    return tuple(each.value for each in precision_recall(features, reference, **kwargs))


def test_on_a_line_the_manifold_is_what_one_draws_by_hand():
    samples = np.array([[0.0], [1.0], [3.0], [10.0]])
    # Neighbours at 1, 1, 2 and 7: the balls fill [-1, 5] and [3, 17].
    points = np.array([[-1.5], [-0.5], [5.5], [17.5], [2.0]])
    np.testing.assert_array_equal(within(points, samples, k=1), [False, True, True, False, True])


def test_the_same_set_has_all_and_a_far_one_nothing():
    x, y = two_sets()
    assert values(x, x) == (1, 1)
    assert values(x, y + 1000) == (0, 0)


def test_a_part_of_the_reference_is_precise_and_recalls_less():
    rng = np.random.default_rng(0)
    reference = np.concatenate([rng.normal(size=(100, 2)), rng.normal(size=(100, 2)) + 50])
    precision, recall = values(rng.normal(size=(200, 2)), reference)
    assert precision > 0.9
    assert 0.4 < recall <= 0.5


def test_precision_of_one_set_is_recall_of_the_other():
    x, y = two_sets()
    assert values(x, y) == values(y, x)[::-1]


def test_it_agrees_with_a_tree_of_neighbours(monkeypatch):
    x, y = two_sets()
    radii = spatial.KDTree(x).query(x, k=3)[0][:, 2]
    expected = (spatial.distance.cdist(y, x) <= radii[None]).any(axis=1)
    assert 0.2 < expected.mean() < 0.8
    np.testing.assert_array_equal(within(y, x, k=2), expected)
    monkeypatch.setattr(kernel, "BLOCK", 1000)
    np.testing.assert_array_equal(within(y, x, k=2), expected)


def test_the_interval_is_that_of_a_share_and_wider_by_what_halves_of_the_manifold_differ():
    x, y = two_sets()
    precision, recall = precision_recall(x, y)
    assert (precision.count, recall.count) == (300, 400)
    rng, differences = np.random.default_rng(5), []
    for _ in range(100):
        halves = np.split(rng.permutation(x), 2)
        differences.append(np.subtract(*[within(y, half, k=3).mean() for half in halves]))
    more = 1 + np.mean(np.square(differences)) / 4 / (recall.value * (1 - recall.value) / 400)
    assert more > 1.5
    # Wilson's bounds are where the share is 1.96 standard errors off.
    for bound in (recall.low, recall.high):
        error = np.sqrt(more * bound * (1 - bound) / 400)
        assert abs(recall.value - bound) / error == pytest.approx(stats.norm.ppf(0.975), rel=0.2)


def test_sets_that_have_samples_twice_have_intervals():
    x, y = (np.repeat(each[:100], 2, axis=0) for each in two_sets())
    precision, recall = precision_recall(x, y)
    assert precision.low < precision.value < precision.high
    assert recall.low < recall.value < recall.high


def test_what_cannot_be_scored_is_said():
    x, y = two_sets()
    with pytest.raises(
        ValueError, match=r"sets of 7 and 400 samples; neighbour 3 .* needs 8 of each"
    ):
        precision_recall(x[:7], y)
    assert precision_recall(x[:8], y).precision.count == 8
    y[0, 0] = np.inf
    with pytest.raises(ValueError, match="1 of 400 samples are NaN or infinite"):
        precision_recall(x, y)


def test_it_is_what_torch_fidelity_prints():
    # metric_prc.prc_features_to_metric of torch-fidelity 0.4.0 on `two_sets()`: 296 of 300, 239 of 400.
    assert values(*two_sets()) == (296 / 300, 239 / 400)


def test_it_is_what_torch_fidelity_answers_now():
    theirs = peer("torch_fidelity.metric_prc")
    import torch

    x, y = two_sets()
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    answer = theirs.prc_features_to_metric(*tensors, prc_neighborhood=5, verbose=False)
    expected = answer["precision"], answer["recall"]  # in float32
    np.testing.assert_allclose(values(x, y, k=5), expected, rtol=1e-6)
