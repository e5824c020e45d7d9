"""Prompt sets in local files, each in the layout in which it was released.

    file:prompts.txt                                        one prompt a line
    coco:captions_val2014.json?count=30000&seed=0           the first caption of each image
    parti:PartiPrompts.tsv?sha256=released                  PartiPrompts, arXiv 2206.10789
    tifa:tifa_v1.0_text_inputs.json                         TIFA v1.0, arXiv 2303.11897; its questions will do too

Options of all: `count` draws so many prompts, by `seed` (default 0); `sha256` is what the file must have, 64
hexadecimal digits or `released`. A new set is one function and one row.
"""

import csv
import hashlib
import io
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.data.text import decode, is_unicode, numbered_lines

_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One prompt, and the part of its set that it belongs to."""

    text: str
    group: str = ""


class PromptSet(NamedTuple):
    """A kind of file.

    Attributes:
      read: from the file's text to its prompts; it raises `ValueError` where the layout is another.
      released: sha256 of the files that were released, as far as they are known.
    """

    read: Callable[[str], Iterable[Row]]
    released: tuple[str, ...] = ()


def read_set(spec: str) -> tuple[Row, ...]:
    """The prompts of `name:PATH?option=value`, of which no two are equal and none is empty.

    They come in the file's order, those of COCO by the numbers of the images, and drawn ones in the order of the draw.
    A text is NFC, without white space around it, and a line break in it is one space.

    Raises:
      ValueError: no such set or option, another checksum, another layout, no prompt, fewer prompts than `count`.
      FileNotFoundError: no such file.
    """
    name, path, options = _parse(spec)
    kind, content = PROMPT_SETS[name], path.read_bytes()
    if wanted := options.get("sha256"):
        _check(content, path, kind.released if wanted == "released" else (wanted,))
    text = decode_file(content, path)
    try:
        rows = [Row(cleaned(row.text), row.group) for row in kind.read(text)]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as {name}: {error}") from error
    return _draw(_distinct(rows, path), spec, path, options)


def decode_file(content: bytes, path: Path) -> str:
    """The text of a file; a ValueError names it where it is not UTF-8."""
    try:
        return decode(content, "strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _file(content: str) -> Iterator[Row]:
    # Whoever wrote the list can mend it, so an equal prompt is not left out but told.
    seen: dict[str, int] = {}
    for number, text in numbered_lines(content):
        first = seen.setdefault(cleaned(text), number)
        if first != number:
            raise ValueError(f"the prompt {text!r} stands in lines {first} and {number}")
        yield Row(text)


def _coco(content: str) -> Iterator[Row]:
    file = _json(content, dict)
    first: dict[int, tuple[int, str]] = {}
    for number, note in enumerate(_field(file, "annotations", list, "the file"), 1):
        where = f"annotation {number}"
        image, key = (_field(note, field, int, where) for field in ("image_id", "id"))
        caption = key, _field(note, "caption", str, where)
        first[image] = min(first.get(image, caption), caption)
    images = enumerate(_field(file, "images", list, "the file"), 1)
    for image in sorted({_field(row, "id", int, f"image {number}") for number, row in images}):
        yield Row(first.get(image, (0, ""))[1])


def _parti(content: str) -> Iterator[Row]:
    # The released file quotes nothing: a quotation mark is part of its prompt.
    lines = io.StringIO(content, newline="")
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    columns = rows.fieldnames or ()
    if not {"Prompt", "Category"} <= set(columns):
        raise ValueError(
            f"it has to have columns Prompt and Category; it has {', '.join(columns) or 'none'}"
        )
    if len(set(columns)) < len(columns):
        raise ValueError(f"two of its columns have one name: {', '.join(columns)}")
    for row in rows:
        where = f"line {rows.line_num}"
        if None in row:
            raise ValueError(f"{where} has more columns than the {len(columns)} of the first line")
        yield Row(_field(row, "Prompt", str, where), _field(row, "Category", str, where))


def _tifa(content: str) -> Iterator[Row]:
    captions: dict[str, str] = {}  # many questions have one caption
    for number, row in enumerate(_json(content, list), 1):
        key, caption = (_field(row, field, str, f"entry {number}") for field in ("id", "caption"))
        captions.setdefault(key, caption)
    return (Row(caption, key.partition("_")[0]) for key, caption in captions.items())


PROMPT_SETS: dict[str, PromptSet] = {
    "file": PromptSet(_file),
    "coco": PromptSet(_coco),
    "parti": PromptSet(  # PartiPrompts.tsv of github.com/google-research/parti at 5a65797
        _parti, ("fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",)
    ),
    "tifa": PromptSet(  # tifa_v1.0_text_inputs.json of github.com/Yushi-Hu/tifa at 8e37050
        _tifa, ("650281d508b056ac9782bc84d5493626424ee851a8778af90b9db554cfbc1a0f",)
    ),
}
# option: what its text looks like, and that in words
_OPTIONS = {
    "count": ("0*[1-9][0-9]*", "a whole number from 1 on"),
    "seed": ("[0-9]+", "a whole number from 0 on"),
    "sha256": ("[0-9a-f]{64}|released", "64 hexadecimal digits or released"),
}
_WORDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}


def _parse(spec: str) -> tuple[str, Path, dict[str, str]]:
    name, _, argument = spec.partition(":")
    if name not in PROMPT_SETS:
        raise ValueError(f"eval.prompts is {spec!r}; there are {', '.join(PROMPT_SETS)}")
    # Only `?word=` begins the options: a question mark may be part of a path.
    path, options = re.fullmatch(r"(.*?)(?:\?(\w+=.*))?", argument, re.DOTALL).groups(default="")
    if not path:
        raise ValueError(f"eval.prompts is {spec!r}, which names no file: write {name}:PATH")
    pairs = [part.partition("=") for part in options.split("&") if part]
    given = {option: text.lower() for option, _, text in pairs}
    _check_options(spec, given, bool(PROMPT_SETS[name].released))
    return name, Path(path), given


def _check_options(spec: str, given: Mapping[str, str], known: bool) -> None:
    for option, text in given.items():
        _check_option(spec, option, text)
    if "seed" in given and "count" not in given:
        raise ValueError(f"eval.prompts is {spec!r}; a seed draws only where a count is given")
    if given.get("sha256") == "released" and not known:
        raise ValueError(
            f"eval.prompts is {spec!r}; no released file of this kind is known by its checksum: give 64 digits"
        )


def _check_option(spec: str, option: str, text: str) -> None:
    if option not in _OPTIONS:
        allowed = ", ".join(_OPTIONS)
        raise ValueError(
            f"eval.prompts is {spec!r}; {option!r} is no option, allowed are {allowed}"
        )
    pattern, words = _OPTIONS[option]
    if not re.fullmatch(pattern, text):
        raise ValueError(f"eval.prompts is {spec!r}; {option} is {text!r}, and has to be {words}")


def _check(content: bytes, path: Path, wanted: tuple[str, ...]) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found not in wanted:
        raise ValueError(
            f"the sha256 of {path} is {found}, and eval.prompts asks for {' or '.join(wanted)}"
        )


def cleaned(text: str) -> str:
    """A prompt as it is used: NFC, without white space around it, a line break as one space. Raises ValueError."""
    if not is_unicode(text):
        raise ValueError(f"the prompt {text!r} is not Unicode text")
    lines = (line.strip() for line in unicodedata.normalize("NFC", text).splitlines())
    return " ".join(filter(None, lines))


def _distinct(rows: list[Row], path: Path) -> list[Row]:
    """The rows without empty ones, and without those whose text an earlier one has."""
    full = [row for row in rows if row.text]
    kept: dict[str, Row] = {}
    for row in full:
        kept.setdefault(row.text, row)
    if len(kept) < len(rows):
        counts = len(full) - len(kept), len(rows) - len(full), len(kept)
        _log.info(
            "%s: %d repeated and %d empty prompts are left out of it; %d stay.", path, *counts
        )
    return list(kept.values())


def _draw(rows: list[Row], spec: str, path: Path, options: Mapping[str, str]) -> tuple[Row, ...]:
    """All rows, or `count` of them by a hash of seed and text, so that fewer are the beginning of more."""
    count, seed = int(options.get("count", len(rows))), int(options.get("seed", 0))
    if not rows:
        raise ValueError(f"{path} holds no prompt")
    if count > len(rows):
        raise ValueError(
            f"eval.prompts is {spec!r}; count is {count}, and {path} holds {len(rows)} different prompts"
        )
    order = lambda row: hashlib.sha256(f"{seed}\n{row.text}".encode()).digest()  # noqa: E731
    return tuple(sorted(rows, key=order)[:count] if "count" in options else rows)


def _json(content: str, kind: type) -> Any:
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"its JSON is {_WORDS.get(type(value), 'a value')}, not {_WORDS[kind]}")
    return value


def _field(row: Any, name: str, kind: type, where: str) -> Any:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{where} has no {name!r} that is {_WORDS[kind]}")
    return value
