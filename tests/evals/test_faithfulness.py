"""Questions and answers, marked by readers whose answers are known."""

import numpy as np
import pytest

from ldm_jax.data.scenes import KINDS, draw_scene
from ldm_jax.evals.faithfulness import (
    CHOICES,
    HEADS,
    OUTPUTS,
    SLICES,
    UNASKED,
    answer,
    faithfulness,
    questions,
    targets,
)
from ldm_jax.metrics.estimate import mean_estimate

SCENES = [draw_scene("full", "all", 4, index) for index in range(200)]


def oracle(scene) -> np.ndarray:
    """Logits that say exactly what the graph says."""
    logits = np.zeros(OUTPUTS)
    for head, target in zip(HEADS, targets(scene), strict=True):
        if target != UNASKED:
            logits[SLICES[head]][target] = 10.0
    return logits


def test_heads_cover_the_outputs_once():
    covered = np.concatenate([np.arange(OUTPUTS)[part] for part in SLICES.values()])
    np.testing.assert_array_equal(covered, np.arange(OUTPUTS))


def test_a_reader_that_knows_the_graph_answers_everything_rightly():
    scores = faithfulness(np.stack([oracle(s) for s in SCENES]), [questions(s) for s in SCENES])
    assert all(np.nanmin(score) == 1.0 for score in scores.values())


def test_a_reader_that_guesses_scores_the_chance_that_the_choices_give():
    asked = [questions(scene, number) for number, scene in enumerate(SCENES)]
    logits = np.random.default_rng(0).normal(size=(len(SCENES), OUTPUTS))
    score = mean_estimate(faithfulness(logits, asked)["faithfulness"])
    chance = np.mean([np.mean([1 / len(q.choices) for q in row]) for row in asked])
    assert score.low < chance < score.high


def test_a_reader_that_sees_nothing_scores_chance_in_every_attribute():
    scenes = [draw_scene("full", "all", 7, index) for index in range(400)]
    asked = [questions(scene, number) for number, scene in enumerate(scenes)]
    scores = faithfulness(np.zeros((len(scenes), OUTPUTS)), asked)
    for name, score in scores.items():
        alike = [
            q
            for row in asked
            for q in row
            if name in ("faithfulness", f"faithfulness/{q.attribute}")
        ]
        assert abs(np.nanmean(score) - np.mean([1 / len(q.choices) for q in alike])) < 0.08, name


def test_every_question_has_one_right_choice_among_distinct_ones():
    for number, scene in enumerate(SCENES):
        for question in questions(scene, number):
            assert question.choices.count(question.answer) == 1
            assert 2 <= len(set(question.choices)) == len(question.choices) <= CHOICES


def test_wrong_kinds_to_choose_from_are_not_in_the_scene():
    for number, scene in enumerate(SCENES):
        present = {thing.kind for thing in scene.things}
        for question in questions(scene, number):
            if question.attribute == "kind":
                assert set(question.choices) & present == {question.answer}


def test_the_right_choice_stands_anywhere():
    places = [q.choices.index(q.answer) for n, s in enumerate(SCENES) for q in questions(s, n)]
    assert len(set(places)) == CHOICES


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_colour_costs_the_question_of_the_colour_only(kind):
    scene = next(s for s in SCENES if s.things[0].kind == kind)
    logits = oracle(scene)
    head = SLICES[kind, "colour"]
    logits[head] = -logits[head]
    wrong = {q.attribute for q in questions(scene) if answer(q, logits) != q.answer}
    assert wrong == {"colour"}


def test_a_relation_is_judged_from_the_places_of_both():
    scene = next(s for s in SCENES if any(q.attribute == "relation" for q in questions(s)))
    question = next(q for q in questions(scene) if q.attribute == "relation")
    swapped = oracle(scene)
    for name in ("row", "column"):
        first, second = SLICES[question.kind, name], SLICES[question.other, name]
        swapped[first], swapped[second] = oracle(scene)[second], oracle(scene)[first]
    assert answer(question, oracle(scene)) == question.answer != answer(question, swapped)


def test_what_is_not_asked_of_an_image_is_nan():
    asked = [questions(scene) for scene in SCENES]
    scores = faithfulness(np.stack([oracle(s) for s in SCENES]), asked)
    related = [any(q.attribute == "relation" for q in row) for row in asked]
    np.testing.assert_array_equal(np.isnan(scores["faithfulness/relation"]), np.invert(related))
    assert not np.isnan(scores["faithfulness"]).any()
