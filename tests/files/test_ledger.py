"""The ledger keeps what was written, whoever wrote beside and whoever was killed."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import ldm_jax
from ldm_jax.files.ledger import append_record, commit, read_records
from ldm_jax.files.lines import read_lines
from ldm_jax.training.record import RunRecord
from ldm_jax.types import Estimate

RECORD = RunRecord(
    study="capacity",
    config={"train": {"batch": 256, "widths": [1, 2]}, "clip": None},
    commit="0123abc",
    chips="TPU v5p x 8",
    seed=0,
    params=866_000_000,
    flops=1.5e21,
    examples=12_800,
    seconds=3600.5,
    losses={"train": 0.1, "t=0.5": 1 / 3},
    scores={"clip": Estimate(0.31, 0.30, 0.32, 1000)},
)


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "records.jsonl"


def test_record_comes_back_as_it_was(ledger):
    append_record(ledger, RECORD)
    (found,) = read_records(RunRecord, ledger)
    assert found == RECORD
    assert isinstance(found.scores["clip"], Estimate)


def test_commit_is_what_git_says_and_tells_of_changed_files():
    git = ["git", "-C", str(Path(ldm_jax.__file__).parent)]
    if subprocess.run([*git, "rev-parse"], capture_output=True).returncode:
        pytest.skip("no checkout")
    said = lambda *words: subprocess.run([*git, *words], capture_output=True, text=True).stdout  # noqa: E731
    changed = said("status", "--porcelain", "--untracked-files=no", ":/").strip()
    assert commit() == said("rev-parse", "HEAD").strip() + ("-dirty" if changed else "")


def test_infinite_loss_is_kept(ledger):
    append_record(ledger, dataclasses.replace(RECORD, losses={"train": math.inf}))
    assert read_records(RunRecord, ledger)[0].losses == {"train": math.inf}


def test_a_text_with_separators_that_are_no_line_ends_is_one_line(ledger):
    line = dataclasses.asdict(dataclasses.replace(RECORD, study="one\u2028two\x85three"))
    ledger.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [row["study"] for row in read_lines(ledger)] == ["one\u2028two\x85three"]
    assert [record.study for record in read_records(RunRecord, ledger)] == ["one\u2028two\x85three"]


def test_repeated_run_counts_once_with_its_last_line(ledger):
    other = dataclasses.replace(RECORD, seed=1)
    again = dataclasses.replace(RECORD, seconds=1.0, commit="fedc")
    for record in (RECORD, other, again):
        append_record(ledger, record)
    assert read_records(RunRecord, ledger) == [again, other]


@pytest.mark.parametrize("field", ["study", "seed", "examples", "config"])
def test_runs_differ_by_study_config_seed_and_examples(ledger, field):
    value = {"study": "other", "seed": 1, "examples": 1, "config": {}}[field]
    append_record(ledger, RECORD)
    append_record(ledger, dataclasses.replace(RECORD, **{field: value}))
    assert len(read_records(RunRecord, ledger)) == 2


def test_ledgers_are_read_together(ledger, tmp_path):
    other = dataclasses.replace(RECORD, seed=1)
    append_record(ledger, RECORD)
    append_record(tmp_path / "more.jsonl", other)
    assert read_records(RunRecord, ledger, tmp_path / "more.jsonl") == [RECORD, other]


@pytest.mark.parametrize("kept", [1, 100, -2])
def test_torn_line_is_left_out_and_spoils_no_other(ledger, kept):
    append_record(ledger, RECORD)
    append_record(ledger, dataclasses.replace(RECORD, seed=1))
    whole = ledger.read_bytes()
    start = whole.index(b"\n") + 1
    ledger.write_bytes(whole[:start] + whole[start:][:kept])
    with pytest.warns(UserWarning, match=r"line 2: unfinished"):
        assert read_records(RunRecord, ledger) == [RECORD]
    append_record(ledger, dataclasses.replace(RECORD, seed=2))
    with pytest.warns(UserWarning, match=r"line 2: unfinished"):
        assert [record.seed for record in read_records(RunRecord, ledger)] == [0, 2]


def test_line_without_its_break_still_counts(ledger):
    append_record(ledger, RECORD)
    ledger.write_bytes(ledger.read_bytes().rstrip())
    append_record(ledger, dataclasses.replace(RECORD, seed=1))
    assert [record.seed for record in read_records(RunRecord, ledger)] == [0, 1]


def test_line_that_is_no_record_is_named(ledger):
    ledger.write_text('{"study": "x"}\n')
    with pytest.raises(ValueError, match=r"records\.jsonl, line 1 is no record; one has chips, "):
        read_records(RunRecord, ledger)


WRITER = """
import dataclasses, sys
sys.path.insert(0, {here!r})
from test_ledger import RECORD
from ldm_jax.files.ledger import append_record
for seed in range({start}, {start} + 20):
    append_record({path!r}, dataclasses.replace(RECORD, seed=seed, config={{"text": "x" * 9000}}))
"""


def test_lines_of_several_processes_do_not_mix(ledger):
    here, root = str(Path(__file__).parent), str(Path(ldm_jax.__file__).parent.parent)
    sources = [WRITER.format(here=here, path=str(ledger), start=start) for start in (0, 20, 40)]
    writers = [
        subprocess.Popen([sys.executable, "-c", source], env={"PYTHONPATH": root})
        for source in sources
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert sorted(record.seed for record in read_records(RunRecord, ledger)) == list(range(60))
