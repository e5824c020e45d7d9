"""Faithfulness on scenes: multiple-choice questions from the prompt, answered from the image.

TIFA's method (Hu et al. 2023, arXiv 2303.11897) with `models.reader` in place of a visual question answering model.
The questions come from the scene graph that the prompt describes; the reader answers each by the choice to which
it gives the most weight. An image without anything to see scores near chance, about a third.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import softmax

from ldm_jax.data.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    KINDS,
    Scene,
    relations,
)

CHOICES = 4  # at most, as in TIFA
UNASKED = -1
SCENE = "scene"  # what the background is asked of

# The reader's outputs: (kind, attribute) -> the answers that its logits stand for, one head after another.
HEADS: dict[tuple[str, str], tuple[str, ...]] = {
    **{(kind, name): values for kind in KINDS for name, values in ATTRIBUTES.items()},
    (SCENE, "background"): tuple(BACKGROUNDS),
}
_ENDS = np.cumsum([len(values) for values in HEADS.values()])
SLICES = {
    head: slice(int(end) - len(values), int(end))
    for (head, values), end in zip(HEADS.items(), _ENDS, strict=True)
}
OUTPUTS = int(_ENDS[-1])
OF_A_KIND = sum(len(values) for values in ATTRIBUTES.values())  # outputs for each kind


class Question(NamedTuple):
    """One multiple-choice question; a relation is asked of `kind` with regard to `other`."""

    text: str
    kind: str
    attribute: str
    choices: tuple[str, ...]
    answer: str
    other: str = ""


def targets(scene: Scene) -> Int[np.ndarray, " heads"]:
    """The right answer of every head as an index, UNASKED where the scene has no thing of that kind."""
    things = {thing.kind: thing for thing in scene.things}
    truth = {(SCENE, "background"): scene.background}
    for kind in KINDS:
        truth[kind, "presence"] = "present" if kind in things else "absent"
        if kind in things:
            truth |= {
                (kind, name): getattr(things[kind], name)
                for name in ATTRIBUTES
                if name != "presence"
            }
    return np.array(
        [values.index(truth[head]) if head in truth else UNASKED for head, values in HEADS.items()]
    )


def questions(scene: Scene, seed: int = 0) -> list[Question]:
    """What the dense caption of a scene says, asked; `seed` draws the wrong choices."""
    rng = np.random.default_rng(seed)
    present = [thing.kind for thing in scene.things]
    asked = [
        _question(
            "What is the background?", SCENE, "background", scene.background, BACKGROUNDS, rng
        )
    ]
    for thing in scene.things:
        absent = [kind for kind in KINDS if kind not in present]
        asked.append(
            _question("Which shape is there?", thing.kind, "kind", thing.kind, absent, rng)
        )
        for name, values in ATTRIBUTES.items():
            if name != "presence":
                text = f"What is the {name} of the {thing.kind}?"
                asked.append(_question(text, thing.kind, name, getattr(thing, name), values, rng))
    for a, word, b in relations(scene)[:1]:
        choices = ("left of", "right of") if word == "left of" else ("above", "below")
        if rng.random() < 0.5:  # else the first choice would always be right
            a, b, word = b, a, choices[1]
        text = f"Is the {a.kind} {choices[0]} or {choices[1]} the {b.kind}?"
        asked.append(Question(text, a.kind, "relation", choices, word, b.kind))
    return asked


def _question(
    text: str,
    kind: str,
    attribute: str,
    answer: str,
    values: Iterable[str],
    rng: np.random.Generator,
) -> Question:
    wrong = [value for value in values if value != answer]
    drawn = rng.choice(len(wrong), min(CHOICES - 1, len(wrong)), replace=False)
    choices = tuple(rng.permutation([answer, *(wrong[i] for i in drawn)]).tolist())
    return Question(text, kind, attribute, choices, answer)


def answer(question: Question, logits: Float[np.ndarray, " outputs"]) -> str:
    """The reader's choice."""
    if question.attribute == "kind":
        weights = [
            np.subtract(*logits[SLICES[kind, "presence"]][::-1]) for kind in question.choices
        ]
    elif question.attribute == "relation":
        weights = _relation(question, logits)
    else:
        values = HEADS[question.kind, question.attribute]
        row = logits[SLICES[question.kind, question.attribute]]
        weights = [row[values.index(choice)] for choice in question.choices]
    return question.choices[int(np.argmax(weights))]


def _relation(question: Question, logits: Float[np.ndarray, " outputs"]) -> list[float]:
    """Probabilities that the first thing comes before or after the second one, from both things' places."""
    name = "column" if "left of" in question.choices else "row"
    first, second = (
        softmax(logits[SLICES[kind, name]]) for kind in (question.kind, question.other)
    )
    joint = np.outer(first, second)
    return [float(np.triu(joint, 1).sum()), float(np.tril(joint, -1).sum())]


def marks(
    logits: Float[np.ndarray, "n outputs"], asked: Sequence[Sequence[Question]]
) -> list[list[bool]]:
    """For every image, whether each of its questions is answered rightly."""
    return [
        [answer(question, row) == question.answer for question in of_one]
        for row, of_one in zip(logits, asked, strict=True)
    ]


def faithfulness(
    logits: Float[np.ndarray, "n outputs"], asked: Sequence[Sequence[Question]]
) -> dict[str, Float[np.ndarray, " n"]]:
    """The share of right answers of each image, of all questions and by attribute; NaN where none is asked."""
    marked = marks(logits, asked)
    shares = {"faithfulness": np.array([np.mean(row) for row in marked])}
    for name in dict.fromkeys(question.attribute for row in asked for question in row):
        by_image = [
            [mark for mark, question in zip(row, of_one, strict=True) if question.attribute == name]
            for row, of_one in zip(marked, asked, strict=True)
        ]
        shares[f"faithfulness/{name}"] = np.array(
            [np.mean(row) if row else np.nan for row in by_image]
        )
    return shares
