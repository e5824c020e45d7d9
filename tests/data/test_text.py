"""Text is decoded and cut into lines in one way, wherever it comes from."""

import codecs

import pytest

from ldm_jax.data.text import decode, is_unicode, numbered_lines

SEPARATORS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines cuts, and no editor does


def test_a_byte_order_mark_is_no_part_of_the_text():
    assert decode(codecs.BOM_UTF8 + "a café".encode()) == "a café"
    assert decode("a\ufeffb".encode()) == "a\ufeffb"


def test_other_bytes_than_utf_8_survive_as_surrogates_or_raise():
    assert decode(b"caf\xe9").encode("utf-8", "surrogateescape") == b"caf\xe9"
    assert not is_unicode(decode(b"caf\xe9")) and is_unicode(decode("café 🐕".encode()))
    with pytest.raises(UnicodeDecodeError):
        decode(b"caf\xe9", "strict")


def test_lines_end_with_the_ends_of_three_systems_and_with_nothing_else():
    text = f"one\ntwo\r\nthree\r\r  \n{SEPARATORS.join('abcdefghi')}"
    expected = [(1, "one"), (2, "two"), (3, "three"), (6, SEPARATORS.join("abcdefghi"))]
    assert list(numbered_lines(text)) == expected
