"""The page of a run: whole, self-contained, and plain about what is missing."""

import contextlib
import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from ldm_jax.evals.image_grids import save_grid
from ldm_jax.files.ledger import append_record
from ldm_jax.pages.run import MAX_SHEETS, MAX_TILE, page, read_run, sheet
from ldm_jax.report import add_flags, main
from ldm_jax.settings.command_line import parse
from ldm_jax.training.record import RunRecord

VOID = {"meta", "input", "br", "hr", "img", "link"}
PROMPTS, SHOWN, SIDE = 20, 14, 16
COUNTS = range(0, 24_000, 1_000)
RECORD = RunRecord(
    study="demo",
    config={},
    commit="0123abc",
    chips="CPU x 1",
    seed=0,
    params=1_234_567,
    flops=3.0e15,
    examples=23_000,
    seconds=460.0,
    losses={"train": 0.1},
    scores={},
)


class Outline(HTMLParser):
    """Checks that every tag is closed in order, and collects what the page shows."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.shown, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.shown.append(" ".join(data.split()))

    @property
    def text(self):
        return " ".join(filter(None, self.shown))


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def images(value, side=SIDE):
    return np.full((SHOWN, side, side, 3), value, np.uint8)


def evaluation(examples):
    high = 0.3 + examples / 50_000
    return {
        "examples": examples,
        "weights": "ema",
        "scores": {
            "faithfulness": [high, high - 0.05, high + 0.05, 64],
            "faithfulness/seen": [high + 0.02, high - 0.05, high + 0.1, 32],
            "faithfulness/gap": [0.01, -0.01, 0.02, 64],
            "CLIP <score>": [25 + high, 24 + high, 26 + high, 64],
        },
        "validation": {"0.1": 0.4 - high / 9, "0.5": 0.2 - high / 9, "0.9": 0.1},
        "samples": f"samples/{examples:012d}.png",
    }


def make_run(run):
    """Writes a finished run."""
    (run / "samples").mkdir(parents=True)
    for examples in COUNTS:
        save_grid(run / f"samples/{examples:012d}.png", images(examples // 100))
    save_grid(run / "samples/true.png", images(255))
    lines(run / "evaluations.jsonl", [evaluation(examples) for examples in COUNTS])
    metrics = [{"examples": n, "step": n // 10, "loss": 1 / (1 + n)} for n in range(0, 23_000, 500)]
    lines(run / "metrics.jsonl", metrics)
    prompts = [
        {"prompt": f"a <b>prompt</b> {i}", "group": ("seen", "held out")[i % 2]}
        for i in range(PROMPTS)
    ]
    (run / "prompts.json").write_text(json.dumps(prompts))
    references = {"untrained": {"faithfulness": [0.25, 0.2, 0.3, 64]}}
    (run / "references.json").write_text(json.dumps(references))
    config = {"eval": {"shown": SHOWN}, "sampler": {"name": "ddim", "ddim": {"eta": 0.0}}}
    (run / "config.json").write_text(json.dumps(config))
    append_record(run / "record.jsonl", dataclasses.replace(RECORD, examples=10))
    append_record(run / "record.jsonl", RECORD)
    return run


@pytest.fixture
def workdir(tmp_path):
    """A finished run, to change."""
    return make_run(tmp_path / "demo")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The page of a finished run."""
    return page(read_run(make_run(tmp_path_factory.mktemp("run") / "demo")))


@pytest.fixture(scope="module")
def shown(text):
    return Outline(text)


def outline(workdir):
    return Outline(page(read_run(workdir)))


def test_page_refers_to_nothing_outside(text, shown):
    links = [v for k, v in shown.attributes if k in ("src", "href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert "http" not in text
    assert "@import" not in text
    assert set(re.findall(r"url\((data:|#)?", text)) == {"data:", "#"}


def test_page_shows_every_score_with_interval_and_reference(shown):
    value = 0.3 + COUNTS[-1] / 50_000
    assert (
        f"faithfulness {value:.3g} {value - 0.05:.3g} to {value + 0.05:.3g}, n = 64" in shown.text
    )
    assert "faithfulness/gap 0.01 -0.01 to 0.02, n = 64" in shown.text
    assert "0.25 0.2 to 0.3, n = 64" in shown.text
    assert "CLIP <score> 25.8 24.8 to 26.8, n = 64 not known" in shown.text
    assert shown.tags.count("svg") == 4
    labels = [value for key, value in shown.attributes if key == "aria-label"]
    assert labels[1:] == ["faithfulness", "CLIP <score>", "training", "validation, by noise level"]


def test_page_shows_each_prompt_that_has_an_image_once_by_group(shown):
    found = [piece for piece in shown.shown if piece.startswith(("a <b>prompt", "prompts: "))]
    odd = [f"a <b>prompt</b> {i}" for i in range(1, SHOWN, 2)]
    even = [f"a <b>prompt</b> {i}" for i in range(0, SHOWN, 2)]
    assert found == ["prompts: held out", *odd, "prompts: seen", *even]


def test_grids_are_spread_over_the_run_from_first_to_last(text, shown):
    assert text.count("data:image/png;base64,") == MAX_SHEETS + 1
    (labels,) = [value for key, value in shown.attributes if key == "data-labels"]
    labels = json.loads(labels)
    assert labels[0] == "after 0 examples"
    assert labels[-2:] == ["after 23,000 examples", "true images"]
    assert "after 23,000 examples" in shown.shown


def test_page_shows_costs_and_settings(shown):
    shown = shown.text
    assert "GFLOPs per example 130.4" in shown
    assert "examples per second 50" in shown
    assert "time 7 min 40 s" in shown
    assert "1.23M parameters · 23k examples · 7 min 40 s on CPU x 1" in shown
    assert "sampler.ddim.eta = 0.0" in shown


def test_a_run_of_one_step_has_no_speed(workdir):
    append_record(
        workdir / "record.jsonl", dataclasses.replace(RECORD, examples=24_000, seconds=0.0)
    )
    shown = outline(workdir).text
    assert "GFLOPs per example" in shown and "examples per second" not in shown


def test_last_line_of_a_count_counts_and_an_unfinished_one_does_not(workdir):
    path = workdir / "evaluations.jsonl"
    again = evaluation(COUNTS[-1]) | {"scores": {"faithfulness": [0.99, 0.98, 1.0, 64]}}
    path.write_text(path.read_text() + json.dumps(again) + "\n" + '{"examples": 99')
    run = read_run(workdir)
    assert len(run.evaluations) == len(COUNTS)
    assert "faithfulness 0.99 0.98 to 1, n = 64" in Outline(page(run)).text


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_loss_that_exploded_is_still_drawn(workdir, loss):
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"examples": 23_500, "step": 2_350, "loss": loss}) + "\n")
    assert outline(workdir).tags.count("svg") == 4


def test_run_without_evaluations_says_so(workdir):
    (workdir / "evaluations.jsonl").unlink()
    shown = outline(workdir)
    assert "This run has not been evaluated." in shown.text
    assert "No evaluation of this run has left a grid of images." in shown.text
    assert "No evaluation has a validation loss." in shown.text
    assert shown.tags.count("svg") == 1


def test_each_missing_file_is_said_in_its_place(workdir):
    for name in ("metrics.jsonl", "prompts.json", "references.json", "record.jsonl", "config.json"):
        (workdir / name).unlink()
    shown = outline(workdir).text
    assert "No line of metrics.jsonl has a loss." in shown
    assert "No prompts.json." in shown
    assert "No references.json to hold the scores against." in shown
    assert "No record.jsonl: this run has not finished." in shown
    assert "No config.json." in shown


def test_run_that_has_only_begun_has_a_page(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    shown = outline(tmp_path).text
    assert "0 examples" in shown


def test_images_larger_than_the_page_shows_are_made_smaller(workdir):
    noise = np.random.default_rng(0).integers(0, 256, (SHOWN, 512, 512, 3), np.uint8)
    save_grid(workdir / f"samples/{COUNTS[-1]:012d}.png", noise)
    assert len(page(read_run(workdir))) < MAX_TILE**2 * 16 * 3 * 1.5


def test_directories_without_a_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run: it has none of config\.json, "):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        read_run(tmp_path / "absent")


@pytest.mark.parametrize("content", [b"5", b"{}", b"null", b"[7]", b"\xff"])
@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "evaluations.jsonl", "record.jsonl", "prompts.json", "references.json"],
)
def test_file_of_another_kind_is_a_sentence_with_its_name(workdir, name, content):
    (workdir / name).write_bytes(content)
    absent = name == "references.json" and content == b"{}"  # which is a file without references
    said = contextlib.nullcontext() if absent else pytest.raises(ValueError, match=name)
    with said:
        read_run(workdir)


@pytest.mark.parametrize("line", [{"scores": 5}, {"scores": {"a": [1, 2]}}, {"validation": [1]}])
def test_an_evaluation_with_a_value_of_another_kind_is_named(workdir, line):
    path = workdir / "evaluations.jsonl"
    path.write_text(json.dumps({"examples": 1} | line))
    with pytest.raises(ValueError, match=r"evaluations\.jsonl, line 1 is damaged"):
        read_run(workdir)


def test_embedded_scores_of_foreign_images_are_marked(workdir):
    for source, marked in (("folder:/photos", True), ("scenes:simple", False)):
        config = {"pretrained": "embedded", "data": {"source": source}}
        (workdir / "config.json").write_text(json.dumps(config))
        assert ("mean nothing for other images" in outline(workdir).text) == marked


def test_reconstructions_are_shown_where_they_are(workdir):
    assert "No reconstructions.png" in outline(workdir).text
    save_grid(workdir / "reconstructions.png", np.zeros((4, 8, 8, 3), np.uint8))
    assert "no sample can be better" in outline(workdir).text


def test_file_that_is_no_json_is_named(workdir):
    (workdir / "prompts.json").write_text("[")
    with pytest.raises(ValueError, match=r"prompts\.json is damaged"):
        read_run(workdir)


def test_command_writes_the_page_into_the_run(workdir, capsys):
    main(parse([f"--workdir={workdir}"], add_flags=add_flags))
    assert Outline((workdir / "report.html").read_text()).text
    assert "report.html" in capsys.readouterr().out
    main(parse([f"--workdir={workdir}", f"--output={workdir}/x.html"], add_flags=add_flags))
    assert (workdir / "x.html").is_file()
    assert not list(workdir.glob("*.partial"))


def test_tiles_are_the_images_without_the_gaps(tmp_path):
    values = 17 * np.arange(11)
    colors = values.astype(np.uint8)[:, None, None, None]
    save_grid(tmp_path / "grid.png", np.broadcast_to(colors, (11, SIDE, SIDE, 3)))
    pixels = np.asarray(sheet(tmp_path / "grid.png"))
    assert pixels.shape == (2 * SIDE, 8 * SIDE, 3)
    found = pixels.reshape(2, SIDE, 8, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(16, -1)
    expected = np.append(values, [255] * 5)
    np.testing.assert_array_equal(found, np.broadcast_to(expected[:, None], found.shape))
