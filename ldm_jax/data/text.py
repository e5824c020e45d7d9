"""Text of files: one way to decode it and to cut it into lines, for captions, metadata and prompts."""

import io
from collections.abc import Iterator


def decode(content: bytes, errors: str = "surrogateescape") -> str:
    """Returns UTF-8 as text, without the byte order mark that Windows' editors begin a file with.

    Bytes that are no UTF-8 become surrogates, which `is_unicode` finds; with `errors="strict"` they raise
    UnicodeDecodeError.
    """
    return content.decode("utf-8-sig", errors)


def is_unicode(text: str) -> bool:
    """Returns whether a text can be encoded: it holds no surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields the number, from 1, and the text of every line that is not blank, without white space around it.

    Lines end with LF, CR LF or CR. `str.splitlines` would also cut at separators within a text, such as U+2028.
    """
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            yield number, line.strip()
