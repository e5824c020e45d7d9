"""Images find the ones that they should be by their names, in whatever order these come."""

import numpy as np
import pytest

from ldm_jax.evals.pairing import pair_by_name


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("{}.png", "{:03d}.png"),
        ("{}.png", "{}.jpg"),
        ("{}_fake.png", "{}_real.png"),
        ("a/img-{}.png", "b/c/truth{:05d}.webp"),
        ("gen/{:02d}-00.png", "{}.png"),
        ("{:03d}.png", "simple-train-0-{}"),
    ],
)
def test_the_number_of_a_name_is_found_in_the_order_of_text(name, other):
    """Sorted as text, ten comes before two."""
    mine, theirs = (sorted(map(form.format, range(1, 13))) for form in (name, other))
    pairs = [(name.format(n), other.format(n)) for n in range(1, 13)]
    assert [(a, theirs[n]) for a, n in zip(mine, pair_by_name(mine, theirs), strict=True)] == [
        pair for a in mine for pair in pairs if pair[0] == a
    ]


def test_words_are_names_too_and_one_image_belongs_to_one():
    order = pair_by_name(["cat_1.png", "cat_2.png", "dog_1.png"], ["dog-1", "cat-2", "cat-1"])
    assert order == [2, 1, 0]
    assert pair_by_name(["x.png"], ["whatever.png"]) == [0]


def test_equal_names_are_paired_in_any_order():
    names = [f"{letter}.png" for letter in "abcdefgh"]
    order = np.random.default_rng(0).permutation(len(names))
    found = pair_by_name(names, [names[n] for n in order])
    np.testing.assert_array_equal(order[found], np.arange(len(names)))


@pytest.mark.parametrize(
    ("names", "others", "said"),
    [
        (["1.png", "2.png"], ["2.png", "3.png"], r"1\.png of --images, 3\.png of --truth"),
        (["a.png", "a.jpg"], ["a.png", "b.png"], "a.png, a.jpg of --images"),
        (["1.png", "01.png"], ["1.png", "2.png"], r"do not match"),
        ([f"{n}.png" for n in range(9)], [f"{n}.png" for n in range(10, 19)], "and 6 more"),
    ],
)
def test_names_that_do_not_match_are_named(names, others, said):
    with pytest.raises(ValueError, match=said):
        pair_by_name(names, others)
