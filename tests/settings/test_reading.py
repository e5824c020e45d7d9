"""What people type for a setting, and what it is taken as."""

import math

import pytest

from ldm_jax.settings.reading import read_value

Ints, Floats, Words, Pair = tuple[int, ...], tuple[float, ...], tuple[str, ...], tuple[float, float]

READ = [
    *((text, float, math.inf) for text in ("inf", "Inf", "+inf", "INFINITY", " inf ")),
    *((text, float, -math.inf) for text in ("-inf", "-Infinity")),
    *((text, bool, True) for text in ("TRUE", "true", "1", "yes", "Yes", "on", "ON")),
    *((text, bool, False) for text in ("FALSE", "0", "no", "off", " False ")),
    *((text, Ints, ()) for text in ("", "None", "none", "()", "[]")),
    *((text, Ints, (1, 2)) for text in ("1,2", "1, 2", "(1, 2)", "[1,2]", "1,2,", "1e0, 2e0")),
    *((text, int, 1_000_000) for text in ("1e6", "1E6", "1.0e6", "1_000_000", "1000000.0", "+1e6")),
    ("0x10", int, 16),
    ("08", int, 8),
    ("123e18", int, 123 * 10**18),
    ("1", float, 1.0),
    ("-1e-4", float, -1e-4),
    ("clip_score, kid_clip", Words, ("clip_score", "kid_clip")),
    ("(a, b)", Words, ("a", "b")),
    ("('a, b', 'c')", Words, ("a, b", "c")),
    ("0.1, inf", Floats, (0.1, math.inf)),
    ("(0.2, 1e0)", Pair, (0.2, 1.0)),
    ("(('a', 'b'), ('c', None))", tuple[tuple[str, str | None], ...], (("a", "b"), ("c", None))),
    ("", str, ""),
    (" a ", str, " a "),
    ("", str | None, None),
    ("None", float | None, None),
    ("inf", float | None, math.inf),
]


@pytest.mark.parametrize(("text", "kind", "value"), READ)
def test_a_text_is_taken_as_the_type_says(text, kind, value):
    found = read_value(text, kind, "here")
    assert found == value
    assert repr(found) == repr(value)  # of the same types, inside of tuples too


def test_nan_is_read_for_the_range_to_refuse():
    assert math.isnan(read_value("nan", float, "here"))


REFUSED = [
    *((text, int) for text in ("1.5", "1e-3", "inf", "nan", "1e21", "1e999999999", "x", "", "1,2")),
    *((text, bool) for text in ("2", "y e s", "", "none")),
    *((text, float) for text in ("", "none", "1,5", "0x", "one")),
    *((text, Ints) for text in ("1,x", "1,,2", "1.5", "(1,(2,))")),
    *((text, Pair) for text in ("", "0.1", "0.1,0.2,0.3")),
    ("(" * 10_000, Ints),
]


@pytest.mark.parametrize(("text", "kind"), REFUSED)
def test_what_is_no_value_of_the_type_is_refused_in_one_sentence(text, kind):
    with pytest.raises(ValueError, match=r"^here is .*; it takes ") as caught:
        read_value(text, kind, "here")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["1e400", "-1e999", "9" * 400])
def test_a_number_too_large_for_a_float_is_not_taken_for_infinity(text):
    with pytest.raises(ValueError, match="no larger than float32 holds"):
        read_value(text, float, "here")
