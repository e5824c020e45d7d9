"""Prompts from small files in the layouts of the released sets."""

import hashlib
import itertools
import json
import logging

import pytest

from ldm_jax.evals.prompt_sets import PROMPT_SETS, PromptSet, Row
from ldm_jax.evals.prompts import Prompts, read_lines, read_prompts

PARTI = """Prompt\tCategory\tChallenge\tNote
bond\tAbstract\tBasic\tBiology-inspired concepts
 a sign that says "Stop" \tArtifacts\tWriting & Symbols\t
"Quoted" at once\tArtifacts\tBasic\t
a cat\tAnimals\tBasic\t
"""
COCO = {
    "info": {"year": 2014},
    "images": [
        {"id": number, "file_name": f"COCO_val2014_{number:012d}.jpg"} for number in (42, 7, 99)
    ],
    "annotations": [
        {"image_id": 42, "id": 600, "caption": "The second caption of 42."},
        {"image_id": 7, "id": 31, "caption": "A dog\n runs.\n"},
        {"image_id": 42, "id": 5, "caption": "The first caption of 42."},
        {"image_id": 99, "id": 1, "caption": "A boat."},
        {"image_id": 99, "id": 2, "caption": "A ship."},
    ],
}
TIFA = [
    {"id": "coco_301091", "caption": "A surfer on a beach.", "coco_val_id": "380711"},
    {"id": "drawbench_52", "caption": "Two cats. "},
    {"id": "partiprompt_86", "caption": "a kettle"},
    {"id": "paintskill_3", "caption": "a photo of 3 dogs"},
]
QUESTIONS = [
    row | {"question": f"is this {n}?", "choices": ["yes", "no"], "answer": "yes", "element": "x"}
    for row in TIFA
    for n in range(3)
]
CONTENTS = {
    "file": "bond\na cat\na dog\n",
    "coco": json.dumps(COCO),
    "parti": PARTI,
    "tifa": json.dumps(TIFA),
}


def no_data(count):
    raise AssertionError("nobody asked for the captions of the data")


def read(tmp_path, name: str, content, options: str = "") -> Prompts:
    """The prompts of a file of this content."""
    path = tmp_path / "prompts"
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return read_prompts(f"{name}:{path}{options}", no_data)


def coco(*captions: str) -> dict:
    """One image a caption."""
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(len(captions))],
        "annotations": [
            {"image_id": n, "id": n, "caption": text} for n, text in enumerate(captions)
        ],
    }


def test_every_kind_of_file_has_its_example_here():
    assert CONTENTS.keys() == PROMPT_SETS.keys()


def test_coco_gives_the_first_caption_of_each_image_by_the_images_numbers(tmp_path):
    assert read(tmp_path, "coco", COCO).texts == (
        "A dog runs.",
        "The first caption of 42.",
        "A boat.",
    )


def test_coco_does_not_depend_on_the_order_in_the_file(tmp_path):
    turned = {part: COCO[part][::-1] for part in ("images", "annotations")}
    for options in ("", "?count=2&seed=5"):
        assert read(tmp_path, "coco", turned, options) == read(tmp_path, "coco", COCO, options)


def test_coco_reads_captions_of_the_listed_images_only(tmp_path):
    fewer = COCO | {"images": COCO["images"][:1]}
    assert read(tmp_path, "coco", fewer).texts == ("The first caption of 42.",)


def test_partiprompts_are_read_as_they_are_with_their_categories(tmp_path):
    prompts = read(tmp_path, "parti", PARTI)
    assert prompts.texts == ("bond", 'a sign that says "Stop"', '"Quoted" at once', "a cat")
    assert prompts.groups == ("Abstract", "Artifacts", "Artifacts", "Animals")
    assert read(tmp_path, "parti", PARTI.replace("\n", "\r\n")) == prompts


@pytest.mark.parametrize("rows", [TIFA, QUESTIONS], ids=["text_inputs", "question_answers"])
def test_tifa_gives_each_caption_once_with_the_set_that_it_is_from(tmp_path, rows):
    prompts = read(tmp_path, "tifa", rows)
    assert prompts.texts == ("A surfer on a beach.", "Two cats.", "a kettle", "a photo of 3 dogs")
    assert prompts.groups == ("coco", "drawbench", "partiprompt", "paintskill")


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_fewer_drawn_prompts_are_the_beginning_of_more_and_none_comes_twice(tmp_path, name):
    every = read(tmp_path, name, CONTENTS[name])
    pairs = set(zip(every.texts, every.groups, strict=True))
    drawn = [read(tmp_path, name, CONTENTS[name], f"?count={n}&seed=3") for n in (1, 2, 3)]
    for fewer, more in itertools.pairwise(drawn):
        assert more.texts[: len(fewer.texts)] == fewer.texts
    assert len(set(drawn[-1].texts)) == 3
    assert set(zip(drawn[-1].texts, drawn[-1].groups, strict=True)) <= pairs


def test_a_draw_takes_every_prompt_equally_often_over_seeds(tmp_path):
    words = [f"prompt {number}" for number in range(10)]
    first = [
        read(tmp_path, "coco", coco(*words), f"?count=1&seed={seed}").texts[0]
        for seed in range(1000)
    ]
    counts = [first.count(word) for word in words]
    assert sum((count - 100) ** 2 / 100 for count in counts) < 27.9  # chi square, 9 degrees: 0.1%


def test_without_a_seed_the_seed_is_0(tmp_path):
    drawn = [read(tmp_path, "parti", PARTI, f"?count=4{seed}") for seed in ("", "&seed=0")]
    assert drawn[0] == drawn[1]


def test_repeated_and_empty_captions_of_a_released_set_are_left_out_and_counted(tmp_path, caplog):
    captions = coco("A dog.", "  ", " A dog.\n", "A cat.", "", "A dog.")
    with caplog.at_level(logging.INFO, "ldm_jax"):
        prompts = read(tmp_path, "coco", captions)
    assert prompts.texts == ("A dog.", "A cat.")
    assert "2 repeated and 2 empty prompts are left out" in caplog.text
    with pytest.raises(ValueError, match=r"count is 3, and .*prompts holds 2 different prompts"):
        read(tmp_path, "coco", captions, "?count=3")


def test_of_a_repeated_prompt_the_earlier_group_holds(tmp_path):
    rows = [{"id": "coco_1", "caption": "a cat"}, {"id": "drawbench_1", "caption": "a cat"}]
    assert read(tmp_path, "tifa", rows).groups == ("coco",)


def test_where_nothing_is_left_out_nothing_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ldm_jax"):
        read(tmp_path, "tifa", QUESTIONS)
    assert not [record for record in caplog.records if record.name.startswith("ldm_jax")]


@pytest.mark.parametrize("second", ["a café", "  a café ", "a cafe\u0301"])
def test_a_prompt_that_stands_twice_in_a_file_of_lines_is_named_with_both_lines(tmp_path, second):
    with pytest.raises(ValueError, match=r"prompts cannot .*'a caf.*' stands in lines 2 and 5"):
        read(tmp_path, "file", f"one\na café\n\ntwo\n{second}\n")


def test_lines_to_sample_may_stand_twice(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa dog\n\n a dog \n", encoding="utf-8")
    assert read_lines(path) == ("a dog", "a dog")


def test_prompts_of_lines_hold_separators_that_are_no_line_ends(tmp_path):
    text = "a cat\u2028on a mat\na\x85 dog\r\na\v\f\x1c\x1d\x1e bird\rthe end"
    expected = ("a cat\u2028on a mat", "a\x85 dog", "a\v\f\x1c\x1d\x1e bird", "the end")
    path = tmp_path / "prompts.txt"
    path.write_bytes(text.encode())
    assert read_lines(path) == expected
    assert read(tmp_path, "file", text).texts == ("a cat on a mat", "a dog", "a bird", "the end")


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_a_byte_order_mark_is_no_part_of_a_prompt_set(tmp_path, name):
    marked = "\ufeff" + CONTENTS[name]
    assert read(tmp_path, name, marked) == read(tmp_path, name, CONTENTS[name])


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_composed_and_decomposed_letters_are_one_prompt(tmp_path, name):
    content = CONTENTS[name].replace("bond", "cafe\u0301").replace("kettle", "cafe\u0301")
    content = content.replace("A boat", "A cafe\u0301")
    assert any("caf\u00e9" in text for text in read(tmp_path, name, content).texts)


def test_line_breaks_in_a_caption_become_one_space_and_other_space_stays(tmp_path):
    captions = coco("A  dog \n\r\n\tand\u2028a cat\n")
    assert read(tmp_path, "coco", captions).texts == ("A  dog and a cat",)


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_a_file_with_the_checksum_that_was_given_is_read(tmp_path, name):
    known = hashlib.sha256(CONTENTS[name].encode()).hexdigest()
    for digits in (known, known.upper()):
        assert read(tmp_path, name, CONTENTS[name], f"?sha256={digits}").texts


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_a_file_with_another_checksum_is_refused_with_both(tmp_path, name):
    found = hashlib.sha256(CONTENTS[name].encode()).hexdigest()
    with pytest.raises(ValueError, match=f"sha256 of .*prompts is {found}, .* asks for {'0' * 64}"):
        read(tmp_path, name, CONTENTS[name], f"?sha256={'0' * 64}")


def test_released_means_the_checksum_of_the_set(tmp_path, monkeypatch):
    released = (hashlib.sha256(PARTI.encode()).hexdigest(),)
    monkeypatch.setitem(PROMPT_SETS, "parti", PROMPT_SETS["parti"]._replace(released=released))
    assert read(tmp_path, "parti", PARTI, "?sha256=released").texts
    with pytest.raises(ValueError, match=f"asks for {released[0]}"):
        read(tmp_path, "parti", PARTI + "\n", "?sha256=released")
    with pytest.raises(ValueError, match="no released file of this kind is known"):
        read(tmp_path, "coco", COCO, "?sha256=released")


def test_the_digest_is_that_of_a_file_with_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts"
    prompts = read(tmp_path, "file", "a red circle\na café\n")
    assert prompts.digest == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    # sha256 of "abc" and a line break, as every sha256sum gives it
    assert Prompts(("abc",), ("",)).digest == "edeaaff3f1774ad2"


def test_the_digest_knows_texts_and_their_order_only():
    prompts = Prompts(("a", "b"), ("", ""))
    assert prompts.digest == Prompts(("a", "b"), ("x", "y")).digest
    others = {Prompts(texts, ("",) * len(texts)).digest for texts in (("b", "a"), ("ab",), ("a",))}
    assert len(others | {prompts.digest}) == 4


def test_a_new_set_is_one_row(tmp_path, monkeypatch):
    monkeypatch.setitem(PROMPT_SETS, "words", PromptSet(lambda text: map(Row, text.split())))
    assert read(tmp_path, "words", "cat dog cat").texts == ("cat", "dog")


def test_an_unknown_set_is_told_all_that_there_are():
    with pytest.raises(ValueError, match="'drawbench:x'; allowed are captions:COUNT") as error:
        read_prompts("drawbench:x", no_data)
    for name in PROMPT_SETS:
        assert f"{name}:PATH" in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("?count=0", "count is '0', and has to be a whole number from 1 on"),
        ("?count=many", "count is 'many'"),
        ("?count=2&seed=-1", "seed is '-1', and has to be a whole number from 0 on"),
        ("?seed=1", "a seed draws only where a count is given"),
        ("?sha256=abc", "sha256 is 'abc', and has to be 64 hexadecimal digits or released"),
        ("?split=val", "'split' is no option, allowed are count, seed, sha256"),
        ("?count=5", "count is 5, and .*prompts holds 4 different prompts"),
    ],
)
def test_options_that_cannot_be_are_refused_with_what_is_allowed(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "parti", PARTI, options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("coco", TIFA, "its JSON is a list, not an object"),
        ("coco", "{", "it is not JSON: "),
        ("coco", "[" * 100_000, "its JSON is nested too deeply"),
        ("coco", {"images": []}, "the file has no 'annotations' that is a list"),
        ("coco", {"images": [], "annotations": []}, "holds no prompt"),
        (
            "coco",
            {"images": [], "annotations": [{"image_id": 1, "id": 2, "category_id": 3}]},
            "annotation 1 has no 'caption' that is a text",
        ),
        ("coco", COCO | {"images": ["a.jpg"]}, "image 1 has no 'id' that is a whole number"),
        ("coco", coco("\ud83d"), r"the prompt '\\ud83d' is not Unicode text"),
        ("tifa", COCO, "its JSON is an object, not a list"),
        ("tifa", [*TIFA, {"id": 5, "caption": "x"}], "entry 5 has no 'id' that is a text"),
        ("parti", "a cat\na dog\n", "columns Prompt and Category; it has a cat"),
        ("parti", "Prompt\tCategory\tPrompt\n", "two of its columns have one name: Prompt, Cat"),
        ("parti", "", "columns Prompt and Category; it has none"),
        ("parti", PARTI + "a dog\n", "line 6 has no 'Category' that is a text"),
        ("parti", PARTI + "a\tdog\tAnimals\tBasic\t\n", "line 6 has more columns than the 4"),
        ("parti", PARTI.splitlines()[0], "holds no prompt"),
        ("parti", b"Prompt\tCategory\n\xff\tArts\n", "is not UTF-8: "),
        ("file", "\n \n", "holds no prompt"),
        ("file", b"a cat\n\xff\n", "is not UTF-8: .*0xff in position 6"),
    ],
)
def test_a_file_of_another_layout_is_named_with_what_it_lacks(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, name, content)
    assert str(tmp_path / "prompts") in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_prompts(f"tifa:{tmp_path / 'nowhere'}?count=3", no_data)
    with pytest.raises(ValueError, match="'coco:', which names no file: write coco:PATH"):
        read_prompts("coco:", no_data)


def test_a_question_mark_may_be_part_of_a_path(tmp_path):
    path = tmp_path / "which?.txt"
    path.write_text("a dog\na cat\n")
    assert len(read_prompts(f"file:{path}?count=1", no_data).texts) == 1
