"""Every cell of a metadata file is read, or its row is refused: no part of a caption is lost."""

import csv
import io
import json

import pytest

from ldm_jax.data.metadata import read_rows
from ldm_jax.data.sources import Skip

COLUMNS = ("file_name", "text")
CAPTIONS = ["1girl, solo", 'a sign that says "Stop"', "two\nlines", "a\u2028b\x85c\x1cd", " ", ""]


def read(text, name="metadata.csv"):
    return [row for _, row in read_rows(text, name, COLUMNS)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_what_a_writer_of_csv_or_json_wrote_comes_back(end):
    rows = [(f"{number}.png", caption) for number, caption in enumerate(CAPTIONS)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("file_name", "other", "text"), *((name, 7, text) for name, text in rows)])
    assert read(file.getvalue()) == rows
    lines = [
        json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in rows
    ]
    assert read(end.join(lines), "metadata.jsonl") == rows


def test_cells_that_are_missing_are_none_and_empty_lines_nothing():
    assert read("file_name,text\na.png\n\nb.png,x\n") == [("a.png", None), ("b.png", "x")]
    assert read("") == read("file_name,text\n") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,text\na.png,x\nb.png,1girl, solo\n", "csv:3 has 3 cells, more than the 2 of"),
        ("\nfile_name,text\n", "csv:2 has 2 cells, more than the 0 of its header"),
        ("file_name,text,text\na.png,x,y\n", "csv:2 has 2 columns 'text'; it has 'file_name', 't"),
        ('file_name,text\na.png,"x\nb.png,y\n', "csv:3 is no CSV: unexpected end of data"),
        ('file_name,text\na.png,"a" sign\n', "csv:2 is no CSV: ',' expected after '\"'"),
    ],
)
def test_a_row_of_csv_whose_cells_are_not_those_of_the_header_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png", "text": "x", "text": "y"}', "jsonl:2 has 2 columns 'text'"),
        ("{}", "jsonl:2 has no 'file_name'; it has none"),
        ("5", "jsonl:2 is no JSON object with file_name and caption: 5"),
        ("null", "jsonl:2 is no JSON object"),
        ('[["file_name", "a.png"], ["text", "x"]]', "jsonl:2 is no JSON object"),
        ('{"file_name": %s}' % ("9" * 5000), "jsonl:2 is no JSON: .*digits"),
    ],
)
def test_a_line_of_json_that_is_no_row_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        read(f"\n{line}\n", "metadata.jsonl")


def test_json_that_is_nested_too_deeply_costs_its_own_line_only():
    deep = '{"file_name": "a.png", "text": %s}' % ("[" * 100_000 + "]" * 100_000)
    first, second = read(f'{deep}\n{{"file_name": "b.png", "text": "x"}}', "metadata.jsonl")
    assert isinstance(first, Skip) and first.reason == "JSON nested too deeply"
    assert second == ("b.png", "x")
