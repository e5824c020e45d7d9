"""The page of evaluations: whole, self-contained, plain about what is missing, and no winner where there is none."""

import base64
import io
import json
import math
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ldm_jax.evals.image_grids import save_grid
from ldm_jax.pages.elements import MAX_TILE
from ldm_jax.pages.evaluation import evaluation_page

VOID = {"meta", "input", "br", "hr", "img", "link"}
SAMPLERS, GUIDANCES, SEEDS = ("ddim", "dpm++"), (1.0, 3.0, 7.5), (0, 1)
PROMPTS = [f'a <b>red</b> "cube" & {i} circles' for i in range(12)]
SIDE = 16
DIGEST, OTHER = "0123456789abcdef", "fedcba9876543210"


class Page(HTMLParser):
    """Checks that every tag is closed in order, and collects what the page shows."""

    def __init__(self, text):
        super().__init__()
        self.open, self.pieces, self.tags, self.tables = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.pieces.append(" ".join(data.split()))
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data + " "

    @property
    def text(self):
        return " ".join(filter(None, self.pieces))

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def score_tables(self):
        """By row and column of each table that sorts, what stands in its cells."""
        found = []
        for head, *rows in (rows for rows in self.tables if rows[0][0].strip() == "evaluation"):
            names = [name.split()[0] for name in head]
            cells = [[" ".join(cell.split()) for cell in row] for row in rows]
            found.append({row[0].split()[0]: dict(zip(names, row, strict=True)) for row in cells})
        return found


def write(workdir, *lines):
    """Adds lines to the record."""
    with (workdir / "scores.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def evaluation(name, scores, *, sampling=None, model=None, seeds=(0,), **others):
    """A line with these scores, of a model unless something else is said."""
    model = {"examples": 80_000, "weights": "ema"} if model is None else model
    return {
        "cell": name,
        "model": model,
        "sampling": sampling_of("ddim", 3.0) if sampling is None else sampling,
        "seeds": list(seeds),
        "prompts": {"spec": "scenes:simple?count=12", "digest": DIGEST, "count": len(PROMPTS)},
        "reference": "references/photos.npz",
        "networks": {"clip": ["f00d", "bicubic, <antialiased>"]},
        "scores": scores,
        "validation": {"0.1": 0.312, "0.5": None},
        "seconds": 72.3,
        "images_per_second": 10.4,
        "chips": "cpu x 2",
        "commit": "abc1234",
        "pictures": {},
    } | others


def sampling_of(sampler, guidance, steps=20):
    chosen = {"name": sampler, sampler: {"eta": 0.0}}
    return {
        "sampler": chosen,
        "spacing": {"name": "trailing"},
        "steps": steps,
        "guidance": guidance,
    }


def pictures_of(workdir, name, side=SIDE):
    """Writes the pictures of an evaluation, the image of prompt i all of the value 20 i."""
    values = 20 * np.arange(len(PROMPTS), dtype=np.uint8)
    images = np.broadcast_to(values[:, None, None, None], (len(PROMPTS), side, side, 3))
    rows = {"samples": {"prompts": PROMPTS}}
    for kind, order in (("best", [3, 1]), ("worst", [0, 2])):
        prompts = [PROMPTS[i] for i in order]
        rows[kind] = {"score": "clip_score", "prompts": prompts, "values": [0.5 + i for i in order]}
    for kind, row in rows.items():
        row["file"] = f"evaluated/{name}/{kind}.png"
        numbers = [PROMPTS.index(prompt) for prompt in row["prompts"]]
        save_grid(workdir / row["file"], images[numbers])
    return rows


def make_workdir(workdir):
    """Two samplers at three guidances with two seeds and what both make together, and a folder of images."""
    for sampler in SAMPLERS:
        for guidance in GUIDANCES:
            sampling = sampling_of(sampler, guidance)
            middle = 0.5 + 0.02 * guidance + 0.01 * (sampler == "dpm++")
            scores = {
                "clip_score": [middle, middle - 0.003, middle + 0.003, 12],
                "clip_score/seen": [middle, middle - 0.1, middle + 0.1, 6],
                "clip_score/gap": [0.0, -0.1, 0.1, 12],
                "fd_clip": [40 - guidance, 20.0, 50.0, 12],
            }
            for seeds in ((0,), (1,), SEEDS):
                name = f"{sampler}-20-g{guidance:g}-s{'+'.join(map(str, seeds))}-1a2b3c4d"
                pictures = pictures_of(workdir, name) if len(seeds) == 1 else {}
                line = evaluation(name, scores, sampling=sampling, seeds=seeds, pictures=pictures)
                write(workdir, line)
    given = {"clip_score": [0.1, 0.09, 0.11, 12]}
    images = {"images": "folder:/their/<images>"}
    write(workdir, evaluation("images-99", given, model=images, sampling={}, seeds=[]))
    return workdir


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The page of many evaluations."""
    return evaluation_page(make_workdir(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def page_of(workdir, *lines):
    write(workdir, *lines)
    return Page(evaluation_page(workdir))


def best(page, column):
    """The rows of a page's only table whose cells of a column are marked."""
    (rows,) = page.score_tables
    return [name for name, row in rows.items() if re.search(r"\bbest\b", row[column])]


def test_page_refers_to_nothing_outside(text, page):
    links = [
        v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "xlink:href")
    ]
    assert links
    assert all(link.startswith(("#", "data:image/")) for link in links)
    assert "http" not in text
    assert "@import" not in text
    assert set(re.findall(r"url\((#)?", text)) == {"#"}


def test_every_link_leads_to_its_section(page):
    targets = [attrs["href"][1:] for attrs in page.all("a")]
    sections = [attrs["id"] for attrs in page.all("details")]
    assert targets == sections
    assert len(set(sections)) == len(sections)


def test_no_text_of_a_record_becomes_markup(text, page):
    assert "<b>red" not in text and "<images>" not in text and "<antialiased>" not in text
    shown = [attrs for attrs in page.all("img") if attrs["alt"] == PROMPTS[5]]
    assert len(shown) == 12 and all(attrs["title"] == PROMPTS[5] for attrs in shown)
    assert PROMPTS[5] in page.text


def test_page_says_what_was_evaluated_on_what_and_with_what(page):
    about = {row[0].strip(): " ".join(row[1].split()) for row in page.tables[0]}
    assert about["evaluated"] == "examples 80,000, weights ema images folder:/their/<images>"
    assert about["prompts"] == "scenes:simple?count=12"
    assert about["digest of the prompts"] == DIGEST
    assert about["reference"] == "references/photos.npz"
    assert about["networks"] == "clip: f00d (bicubic, <antialiased>)"
    assert (about["code"], about["chips"]) == ("abc1234", "cpu x 2")
    assert "12 prompts of scenes:simple?count=12" in page.text
    assert "13 evaluations · 6 over several seeds" in page.text


def test_table_has_a_row_an_evaluation_and_a_column_a_score_of_all_prompts(page):
    (rows,) = page.score_tables
    assert len(rows) == 2 * 3 * 3 + 1
    columns = ["evaluation", "sampler", "guidance", "seeds", "clip_score", "fd_clip"]
    assert all(list(row) == columns for row in rows.values())
    row = rows["ddim-20-g3-s1-1a2b3c4d"]
    assert (row["sampler"], row["guidance"], row["seeds"]) == ("ddim", "3", "1")
    assert row["clip_score"] == "0.56 0.557 to 0.563"
    assert rows["images-99"]["fd_clip"] == "not scored"


def test_summaries_over_seeds_come_first_and_are_marked(page):
    (rows,) = page.score_tables
    assert ["over 2 seeds" in row["evaluation"] for row in rows.values()] == [True] * 6 + [
        False
    ] * 13
    classes = [attrs["class"] for attrs in page.all("tr") if "class" in attrs]
    assert classes == ["summary"] * 6 + ["single"] * 13


def test_a_summary_competes_in_place_of_its_seeds(page):
    assert best(page, "clip_score") == ["dpm++-20-g7.5-s0+1-1a2b3c4d"]


def test_overlapping_intervals_have_no_best(page):
    assert best(page, "fd_clip") == []


LOW = ("fid", "clean_fid", "fd_clip", "fd_dinov2", "kid", "clean_kid", "kid_clip", "cmmd", "lpips")
HIGH = (
    "clip_score",
    "clip_r_precision",
    "faithfulness",
    "inception_score",
    "precision",
    "recall",
    "psnr",
    "ssim",
)


@pytest.mark.parametrize(
    ("name", "winner"), [(n, "low") for n in LOW] + [(n, "high") for n in HIGH]
)
def test_distances_are_best_where_low_and_all_else_where_high(tmp_path, name, winner):
    low = evaluation("low", {name: [1.0, 0.9, 1.1, 9]})
    high = evaluation("high", {name: [2.0, 1.9, 2.1, 9]}, sampling=sampling_of("ddim", 7.5))
    page = page_of(tmp_path, low, high)
    assert best(page, name) == [winner]
    first = {attrs.get("data-first") for attrs in page.all("th")} - {None}
    assert first == {"ascending"} if winner == "low" else {"ascending", "descending"}
    (head,) = [cell for row in page.tables[1] for cell in row if cell.startswith(name)]
    assert f"{'lower' if winner == 'low' else 'higher'} is better" in head


@pytest.mark.parametrize(
    ("rows", "winner"),
    [
        ([[2.0, 1.6, 2.4], [1.0, 0.5, 1.5]], ["0"]),
        ([[2.0, 1.4, 2.4], [1.0, 0.5, 1.5]], []),
        ([[2.0, 1.5, 2.4], [1.0, 0.5, 1.5]], []),
        ([[1.0, 0.9, 1.1], [3.0, 2.9, 3.1], [2.0, 1.5, 2.95]], []),
        ([[1.0, 0.9, 1.1], [3.0, 2.9, 3.1], [2.0, 1.5, 2.85]], ["1"]),
        ([[2.0, None, None], [1.0, 0.5, 1.5]], []),
        ([[2.0, 1.9, 2.1], [1.0, math.nan, math.nan]], []),
        ([[math.nan, math.nan, math.nan], [1.0, 0.5, 1.5]], []),
        ([[math.nan, math.nan, math.nan], [1.0, 0.5, 1.5], [2.0, 1.9, 2.1]], ["2"]),
        ([[1.0, 0.9, 1.1]], []),
    ],
)
def test_best_is_marked_only_where_its_interval_is_apart_from_the_next(tmp_path, rows, winner):
    lines = [
        evaluation(str(i), {"psnr": [*row, 9]}, sampling=sampling_of("ddim", float(i)))
        for i, row in enumerate(rows)
    ]
    assert best(page_of(tmp_path, *lines), "psnr") == winner


def test_the_summary_of_more_seeds_replaces_that_of_fewer(tmp_path):
    scores = {"psnr": [9.0, 8.9, 9.1, 9]}
    other = evaluation("other", {"psnr": [1.0, 0.9, 1.1, 9]}, sampling=sampling_of("ddim", 1.0))
    same = [evaluation(str(seeds), scores, seeds=seeds) for seeds in ([0], [0, 1], [0, 1, 2])]
    same = [line | {"cell": f"seeds{len(line['seeds'])}"} for line in same]
    assert best(page_of(tmp_path, other, *same), "psnr") == ["seeds3"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"reference": "others.npz"}, "reference"),
        ({"networks": {"clip": ["beef", ""]}}, "network clip"),
    ],
)
def test_rows_against_other_references_or_networks_have_no_best(tmp_path, change, name):
    one = evaluation("one", {"fid": [1.0, 0.9, 1.1, 9]})
    other = evaluation("other", {"fid": [2.0, 1.9, 2.1, 9]}, **change)
    page = page_of(tmp_path, one, other)
    assert best(page, "fid") == []
    assert f"do not all have the same {name}" in page.text


def test_a_row_without_a_reference_is_no_other_reference(tmp_path):
    one = evaluation("one", {"fid": [1.0, 0.9, 1.1, 9]})
    other = evaluation("other", {"fid": [2.0, 1.9, 2.1, 9]})
    none = evaluation("none", {}, reference=None)
    assert best(page_of(tmp_path, one, other, none), "fid") == ["one"]


def test_other_prompts_have_a_table_of_their_own(tmp_path):
    prompts = {"spec": "captions:/some.txt", "digest": OTHER, "count": 1}
    one = evaluation("one", {"psnr": [1.0, 0.9, 1.1, 9]})
    other = evaluation("other", {"psnr": [2.0, 1.9, 2.1, 9]}, prompts=prompts)
    page = page_of(tmp_path, one, other)
    assert [list(rows) for rows in page.score_tables] == [["one"], ["other"]]
    assert "scores on different prompts cannot be compared" in page.text
    assert "1 prompt of captions:/some.txt" in page.text
    assert page.all("mark") == []


def test_each_score_has_a_chart_over_guidance_with_a_line_a_sampler(page):
    assert [attrs["aria-label"] for attrs in page.all("svg")] == ["clip_score", "fd_clip"]
    assert page.pieces.count("ddim, 20 steps") == page.pieces.count("dpm++, 20 steps") == 2
    assert (
        page.pieces.count("guidance") == 2 + 2 * 6 + 6 + 1
    )  # axes, sections of both kinds, heading


def test_charts_of_different_prompts_share_no_id(tmp_path):
    prompts = {"spec": "captions:/some.txt", "digest": OTHER, "count": 1}
    lines = [
        evaluation(f"{guidance}{each['digest']}", {"psnr": [1.0, 0.9, 1.1, 9]}, prompts=each)
        | {"sampling": sampling_of("ddim", guidance)}
        for guidance in (1.0, 3.0)
        for each in ({"spec": "x", "digest": DIGEST, "count": 1}, prompts)
    ]
    page = page_of(tmp_path, *lines)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(page.all("svg")) == 2
    assert len(set(ids)) == len(ids)


def test_one_guidance_is_no_curve(tmp_path):
    page = page_of(tmp_path, evaluation("one", {"psnr": [1.0, 0.9, 1.1, 9]}))
    assert page.all("svg") == []
    assert "No score is known at several guidances." in page.text


def test_scores_that_are_not_finite_are_shown_and_not_drawn(tmp_path):
    rows = [[math.nan, math.nan, math.nan, 9], [None, None, None, 9], [math.inf, None, None, 9]]
    rows += [[2.0, None, None, 9], [1.0, 0.9, 1.1, 9]]
    lines = [
        evaluation(str(i), {"psnr": row}, sampling=sampling_of("ddim", float(i)))
        for i, row in enumerate(rows)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = page_of(tmp_path, *lines)
    (shown,) = page.score_tables
    texts = [row["psnr"] for row in shown.values()]
    assert texts[:2] == ["not a number no interval"] * 2
    assert texts[2:4] == ["inf no interval", "2 no interval"]
    values = [attrs["data-value"] for attrs in page.all("td") if "data-value" in attrs][1::2]
    assert values == ["", "", "Infinity", "2.0", "1.0"]
    assert len(page.all("svg")) == 1


def test_tiles_show_the_images_of_their_prompts_with_their_values(tmp_path):
    pictures = pictures_of(tmp_path, "one")
    page = page_of(tmp_path, evaluation("one", {}, pictures=pictures))
    tiles = page.all("img")
    assert [attrs["alt"] for attrs in tiles] == [*PROMPTS, *(PROMPTS[i] for i in (3, 1, 0, 2))]
    for attrs in tiles:
        pixels = decoded(attrs["src"])
        assert pixels.shape == (SIDE, SIDE, 3)
        assert (pixels == 20 * PROMPTS.index(attrs["alt"])).all()
    order = [
        "Samples",
        "Best by clip_score",
        "3.5",
        PROMPTS[3],
        "Worst by clip_score",
        "0.5",
        PROMPTS[0],
    ]
    places = [page.pieces.index(piece) for piece in order[:3]]
    assert places == sorted(places)
    captions = page.pieces[page.pieces.index(order[1]) :]
    captions = [piece for piece in captions if piece][: len(order) + 3]
    assert captions == [*order[1:4], "1.5", PROMPTS[1], *order[4:], "2.5", PROMPTS[2]]


def decoded(address):
    """The pixels behind a `data:` address."""
    data = base64.b64decode(address.partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_large_images_are_made_as_small_as_the_page_shows_them(tmp_path):
    pictures = pictures_of(tmp_path, "one", side=2 * MAX_TILE)
    page = page_of(tmp_path, evaluation("one", {}, pictures=pictures))
    tiles = page.all("img")
    assert {decoded(attrs["src"]).shape for attrs in tiles} == {(MAX_TILE, MAX_TILE, 3)}
    assert all(attrs["src"].startswith("data:image/jpeg") for attrs in tiles)


def test_scores_by_group_stand_in_the_section_with_their_counts(page):
    rows = [[" ".join(cell.split()) for cell in row] for table in page.tables for row in table]
    assert rows.count(["clip_score/seen", "0.56 0.46 to 0.66, n = 6"]) == 3
    assert rows.count(["clip_score/gap", "0 -0.1 to 0.1, n = 12"]) == 18


def test_section_says_how_it_was_made(page):
    rows = [[" ".join(cell.split()) for cell in row] for table in page.tables for row in table]
    for row in (
        ["sampler", "dpm++"],
        ["sampler.dpm++.eta", "0"],
        ["validation loss at t = 0.1", "0.312"],
        ["validation loss at t = 0.5", "not a number"],
        ["time", "1 min 12 s"],
        ["images per second", "10.4"],
    ):
        assert row in rows


def test_what_is_missing_is_said_in_its_place(tmp_path):
    bare = {"cell": "bare", "scores": {}}
    lost = {"samples": {"file": "evaluated/lost/samples.png", "prompts": ["a"]}}
    page = page_of(tmp_path, bare, evaluation("lost", {}, pictures=lost, validation={}, commit=""))
    assert "evaluated/lost/samples.png is not there or cannot be read." in page.text
    assert page.text.count("None were kept.") == 5
    assert page.text.count("It has no scores.") == 2
    assert "reference none" in page.text and "networks none" in page.text
    assert "validation loss none" in page.text and "commit none" in page.text


def test_a_picture_that_is_cut_off_is_said_and_spoils_no_page(tmp_path):
    pictures = pictures_of(tmp_path, "one")
    file = tmp_path / pictures["best"]["file"]
    file.write_bytes(file.read_bytes()[:60])
    page = page_of(tmp_path, evaluation("one", {}, pictures=pictures))
    assert f"{pictures['best']['file']} is not there or cannot be read." in page.text
    assert len(page.all("img")) == len(PROMPTS) + 2


def test_last_line_of_an_evaluation_counts_and_an_unfinished_one_does_not(tmp_path):
    first = evaluation("one", {"psnr": [1.0, 0.9, 1.1, 9]})
    write(tmp_path, first, evaluation("one", {"psnr": [2.0, 1.9, 2.1, 9]}))
    with (tmp_path / "scores.jsonl").open("a") as file:
        file.write(json.dumps(evaluation("one", {"psnr": [3.0, 2.9, 3.1, 9]}))[:-9])
    (rows,) = page_of(tmp_path).score_tables
    assert {name: row["psnr"] for name, row in rows.items()} == {"one": "2 1.9 to 2.1"}


@pytest.mark.parametrize("content", [None, "", '{"cell": "half'])
def test_directory_without_evaluations_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "scores.jsonl").write_text(content)
    with pytest.raises(
        ValueError, match=r"has no evaluations: its scores\.jsonl is absent or empty$"
    ):
        evaluation_page(tmp_path)
