"""Ranges, against comparisons written out."""

import math

import pytest

from ldm_jax.settings.ranges import check_number, check_seed, intervals, words

NUMBERS = [-math.inf, -1e40, -2, -1, -0.5, 0, 0.0, 1e-9, 0.5, 1, 2, 3, 1e38, 1e40, 10**400]
NUMBERS += [math.inf, math.nan]
BIG = 3.4028234663852886e38

RANGES = {
    "[1, inf)": (lambda x: 1 <= x <= BIG, "at least 1"),
    "(0, inf)": (lambda x: 0 < x <= BIG, "above 0"),
    "(0, inf]": (lambda x: 0 < x <= BIG or x == math.inf, "above 0, or inf"),
    "[0, 1)": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "(0, 1)": (lambda x: 0 < x < 1, "above 0 and below 1"),
    "(0, 1]": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "[-1, 0.5]": (lambda x: -1 <= x <= 0.5, "from -1 to 0.5"),
    "(-inf, inf)": (lambda x: -BIG <= x <= BIG, "finite"),
    "-1 or [1, inf)": (lambda x: x == -1 or 1 <= x <= BIG, "-1 or at least 1"),
    "0 or 2": (lambda x: x in (0, 2), "0 or 2"),
}


@pytest.mark.parametrize("text", RANGES)
def test_a_range_holds_what_its_notation_says(text):
    inside, said = RANGES[text]
    for number in NUMBERS:
        assert any(number in part for part in intervals(text)) == inside(number), number
    assert words(text) == said


def test_a_number_outside_is_answered_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"^rate is -1; it is at least 0$"):
        check_number(-1, "[0, inf)", "rate")
    with pytest.raises(
        ValueError, match=r"^rate is inf; it is at least 0, and no larger than float32 holds"
    ):
        check_number(math.inf, "[0, inf)", "rate")
    with pytest.raises(ValueError, match=r"^rate is 1000.*\(401 characters\); it is"):
        check_number(10**400, "[0, inf)", "rate")
    with pytest.raises(ValueError, match=r"^rate is a number of more digits than Python writes"):
        check_number(10**5000, "[0, inf)", "rate")


def test_what_is_no_number_is_refused_as_such():
    with pytest.raises(ValueError, match=r"^rate is '3'; it is a number, at least 0$"):
        check_number("3", "[0, inf)", "rate")


def test_what_is_no_notation_is_refused():
    with pytest.raises(ValueError, match="could not convert"):
        words("1 to 2")


@pytest.mark.parametrize("seed", [-1, 2**32, 5 + 2**32, 2**64 - 1])
def test_a_seed_that_would_be_another_one_is_refused(seed):
    with pytest.raises(ValueError, match=f"^seed is {seed}; it is from 0 to 4294967295$"):
        check_seed(seed, "seed")


def test_the_first_and_the_last_seed_are_allowed():
    assert [check_seed(seed, "seed") for seed in (0, 2**32 - 1)] == [0, 2**32 - 1]
