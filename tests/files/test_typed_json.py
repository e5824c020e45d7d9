"""A JSON file becomes the dataclass that was written, or a sentence that names the file and the value."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pytest

from ldm_jax.files.typed_json import read_json, write_json


@dataclasses.dataclass(frozen=True)
class Leaf:
    name: str
    size: float = 1.0


@dataclasses.dataclass(frozen=True)
class Tree:
    count: int
    leaves: tuple[Leaf, ...]
    names: dict[str, list[str]] = dataclasses.field(default_factory=dict)


TREE = Tree(2, (Leaf("a", 2), Leaf("b")), {"c": ["d"]})


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(dataclasses.asdict(TREE)))
    assert read_json(path, Tree) == TREE
    assert read_json(path, dict)["count"] == 2
    path.write_text('{"count": 1, "leaves": []}')
    assert read_json(path, Tree) == Tree(1, ())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"5", "its content is '5', and must be of type dict"),
        (b"null", "its content is 'None', and must be of type dict"),
        (b"[]", "its content is '[]', and must be of type dict"),
        (b"{}", "count is missing"),
        (b'{"count": true, "leaves": []}', "count is 'True', and must be of type int"),
        (b'{"count": 1.5, "leaves": []}', "count is '1.5', and must be of type int"),
        (b'{"count": 1, "leaves": {}}', "leaves is '{}', and must be of type tuple"),
        (b'{"count": 1, "leaves": [{"name": "a"}, 7]}', "leaves[1] is '7', and must be of"),
        (b'{"count": 1, "leaves": [{"size": 1}]}', "leaves[0].name is missing"),
        (b'{"count": 1, "leaves": [{"name": "a", "age": 1}]}', "leaves[0].age is unknown"),
        (b'{"count": 1, "leaves": [], "names": {"c": [1]}}', "names['c'][0] is '1', and must"),
        (b"", "Expecting value"),
        (b'{"count": 1, "leaves": [], "n\xff": 1}', "can't decode byte 0xff"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_anything_else_is_refused_with_the_file_and_the_value(tmp_path, content, says):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} is damaged, .*{re.escape(says)}"):
        read_json(path, Tree)


class Row(NamedTuple):
    value: float
    count: int


@dataclasses.dataclass(frozen=True)
class Numbers:
    rows: Mapping[str, Row]
    listed: Sequence[float]
    perhaps: float | None = None


NUMBERS = Numbers({"Infinity": Row(math.inf, 2)}, [-math.inf, 1.5], math.inf)


def test_what_is_not_finite_is_json_and_comes_back(tmp_path):
    """Every token that JSON does not have is refused here, as other readers of JSON do."""

    def refuse(token):
        raise AssertionError(token)

    text = write_json(dataclasses.asdict(NUMBERS) | {"nan": math.nan})
    content = json.loads(text, parse_constant=refuse)
    assert math.isnan(float(content.pop("nan")))
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    assert read_json(path, Numbers) == NUMBERS
    path.write_text('{"rows": {"a": [null, 3]}, "listed": ["1.5"]}')
    with pytest.raises(ValueError, match=r"listed\[0\] is '1.5', and must be of type float"):
        read_json(path, Numbers)


def test_a_text_that_reads_infinity_stays_a_text(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(write_json(dataclasses.asdict(Leaf("Infinity", math.inf))))
    assert read_json(path, Leaf) == Leaf("Infinity", math.inf)
