"""The draw of a caption has the stated probabilities and depends on nothing but (seed, position)."""

import numpy as np
import pytest

from ldm_jax.data.captions import CaptionPolicy, check_captions
from ldm_jax.data.sources import Skip

N = 4000


def draws(policy, count, seed=0, positions=range(N)):
    return [policy.choose(count, seed, position) for position in positions]


def assert_share(hits, share):
    """Within 4.5 standard deviations of a binomial share: wrong once in 100,000."""
    hits = np.asarray(hits)
    deviation = np.sqrt(share * (1 - share) / len(hits))
    assert abs(hits.mean() - share) <= 4.5 * deviation


def test_each_caption_has_its_probability():
    chosen = draws(CaptionPolicy(dropout=0.1, alternatives=0.5), count=5)
    assert_share([choice is None for choice in chosen], 0.1)
    assert_share([choice == 0 for choice in chosen], 0.9 * 0.5)
    for alternative in range(1, 5):
        assert_share([choice == alternative for choice in chosen], 0.9 * 0.5 / 4)


def test_without_alternatives_the_main_caption_is_used():
    chosen = draws(CaptionPolicy(dropout=0.2, alternatives=1.0), count=1)
    assert set(chosen) == {None, 0}
    assert_share([choice is None for choice in chosen], 0.2)


@pytest.mark.parametrize(
    ("dropout", "alternatives", "expected"), [(0, 0, {0}), (1, 0.5, {None}), (0, 1, {1, 2})]
)
def test_certain_policies_are_certain(dropout, alternatives, expected):
    policy = CaptionPolicy(float(dropout), float(alternatives))
    assert set(draws(policy, 3, positions=range(200))) == expected


def test_a_draw_depends_on_seed_and_position_alone():
    policy = CaptionPolicy()
    forwards = draws(policy, 5, seed=7, positions=range(100))
    assert draws(policy, 5, seed=7, positions=reversed(range(100))) == forwards[::-1]


def test_seeds_and_positions_are_independent():
    policy = CaptionPolicy(dropout=0.5)
    dropped = [np.array([c is None for c in draws(policy, 5, seed)]) for seed in (0, 1)]
    assert_share(dropped[0] == dropped[1], 0.5)
    assert_share(dropped[0][1:] == dropped[0][:-1], 0.5)
    assert_share(dropped[0][1:] == dropped[1][:-1], 0.5)


def test_dropout_at_a_position_does_not_depend_on_the_captions():
    few, many = (draws(CaptionPolicy(), count, positions=range(500)) for count in (1, 6))
    assert [c is None for c in few] == [c is None for c in many]


def test_what_is_no_probability_is_refused():
    with pytest.raises(ValueError, match=r"dropout is 1\.5; it is from 0 to 1"):
        CaptionPolicy(dropout=1.5)
    with pytest.raises(ValueError, match=r"alternatives is -0\.1"):
        CaptionPolicy(alternatives=-0.1)


@pytest.mark.parametrize(
    ("captions", "reason"),
    [
        ((), "no caption"),
        (("",), "empty caption"),
        ((" \n\t",), "empty caption"),
        (("a dog", "  "), "empty caption"),
        (("x" * 10_000,), "caption longer than 4000 characters"),
        (("a\0b",), "NUL in caption"),
        ((b"caf\xe9".decode("utf-8", "surrogateescape"),), "caption is not UTF-8"),
    ],
)
def test_bad_captions_are_skipped(captions, reason):
    with pytest.raises(Skip) as skip:
        check_captions(captions)
    assert skip.value.reason == reason


def test_good_captions_lose_only_the_white_space_around_them():
    captions = ("a dog\n", " café  ☕ 🐕 ", "x" * 4000)
    assert check_captions(captions) == ("a dog", "café  ☕ 🐕", "x" * 4000)
