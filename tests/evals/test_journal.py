import json

import numpy as np
from PIL import Image

from ldm_jax.evals.journal import Journal
from ldm_jax.types import Estimate

SCORES = {"clip_score": Estimate(0.5, 0.4, 0.6, 8)}
IMAGES = np.zeros((3, 8, 8, 3), np.uint8)


def test_a_line_left_unfinished_by_a_kill_spoils_no_other(tmp_path):
    journal, path = Journal(tmp_path, shown=2), tmp_path / "evaluations.jsonl"
    journal.add(0, "raw", IMAGES, SCORES, {"0.5": 1.0})
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    journal.add(32, "ema", IMAGES, SCORES, {"0.5": 0.5})
    first, torn, last = path.read_text().splitlines()
    assert [json.loads(line)["examples"] for line in (first, last)] == [0, 32]
    assert torn == whole.decode()[: len(whole) // 2]


def test_a_line_has_its_scores_with_intervals_and_its_picture(tmp_path):
    Journal(tmp_path, shown=2).add(32, "ema", IMAGES, SCORES, {"0.5": 0.5})
    row = json.loads((tmp_path / "evaluations.jsonl").read_text())
    assert Estimate(*row["scores"]["clip_score"]) == SCORES["clip_score"]
    with Image.open(tmp_path / row["samples"]) as picture:
        assert picture.width >= 2 * 8


def test_a_line_says_what_its_scores_depend_on(tmp_path):
    journal = Journal(tmp_path, shown=2, described={"prompts": "ab", "reference": "cd"})
    journal.add(32, "ema", IMAGES, SCORES, {})
    row = json.loads((tmp_path / "evaluations.jsonl").read_text())
    assert (row["prompts"], row["reference"]) == ("ab", "cd")
