"""What an evaluation refuses to keep, and what continues after parts that do not join."""

import numpy as np
import pytest

from ldm_jax.evals.cells import Cell, check_comparable, read_cell
from ldm_jax.evals.prompts import read_prompts
from ldm_jax.evals.scores import Scores
from ldm_jax.evals.session import Session, check_finite

PROMPTS = read_prompts("captions:6", lambda count: [f"prompt {n}" for n in range(count)])
SESSION = Session(None, Scores({}, PROMPTS, {}), {}, 4, False, {})
FACTS = {"prompts": {"digest": "ab"}, "networks": {}, "noise": [0, 0], "sampling": {"steps": 2}}


def part(first, count):
    return {"clip": {"image": np.arange(first, first + count, dtype=np.float32)[:, None]}}


def test_an_image_that_is_nan_is_named_by_its_prompt():
    features = part(2, 3) | {"reader": {"logits": np.zeros((3, 5))}}
    check_finite(SESSION, 2, features)
    features["reader"]["logits"][1, 4] = np.nan
    with pytest.raises(ValueError, match="the image of prompt 3, 'prompt 3', is NaN"):
        check_finite(SESSION, 2, features)


def test_an_infinite_score_of_equal_images_is_none_of_that():
    check_finite(SESSION, 0, {"pairs": {"psnr": np.full(3, np.inf)}})


def test_parts_join_to_features_in_order_and_leave_no_others(tmp_path):
    cell = Cell(tmp_path, "a", FACTS)
    assert cell.begin() == 0 and not cell.finished
    for first, count in ((0, 3), (3, 2)):
        cell.add(first, part(first, count))
    assert Cell(tmp_path, "a", FACTS).begin() == 5
    np.testing.assert_array_equal(cell.finish()["clip"]["image"], part(0, 5)["clip"]["image"])
    assert cell.finished
    assert {path.name for path in cell.path.iterdir()} == {"facts.json", "features.npz"}
    assert read_cell(cell.path)[1] == FACTS


def test_parts_behind_a_gap_are_made_again(tmp_path):
    cell = Cell(tmp_path, "a", FACTS)
    cell.begin()
    for first, count in ((0, 3), (5, 2)):
        cell.add(first, part(first, count))
    assert cell.begin() == 3
    cell.add(3, part(3, 4))
    assert len(cell.finish()["clip"]["image"]) == 7


def test_other_facts_are_another_evaluation(tmp_path):
    other = FACTS | {"noise": [0, 1]}
    assert Cell(tmp_path, "a", FACTS).name != Cell(tmp_path, "a", other).name
    check_comparable(FACTS, other, "sampling")
    with pytest.raises(ValueError, match="of other sampling"):
        check_comparable(FACTS, FACTS | {"sampling": {"steps": 3}}, "sampling")
    with pytest.raises(ValueError, match="of other prompts: ab and cd"):
        check_comparable(FACTS, FACTS | {"prompts": {"digest": "cd"}})
