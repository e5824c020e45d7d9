"""Batches of scenes, drawn in the background; nothing is stored."""

import concurrent.futures
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ldm_jax.data.scenes import ATTRIBUTES, BACKGROUNDS, KINDS, Scene, draw_scene, render

# The networks are trained on scenes of this seed and measured on those of the other.
TRAINING, HELD_OUT = 101, 202
SWAPS = ("kind", "colour", "size", "texture", "row", "column")


def draw(indices: range, *, seed: int, preset: str = "full", split: str = "all") -> list[Scene]:
    """The scenes at `indices`."""
    return [draw_scene(preset, split, seed, index) for index in indices]


def images(scenes: list[Scene]) -> np.ndarray:
    """Their pictures, `[B, 64, 64, 3]` in [-1, 1]."""
    return np.stack([render(scene) for scene in scenes]).astype(np.float32) / 127.5 - 1


def batches(
    make: Callable[[list[Scene]], Any],
    size: int,
    *,
    presets: tuple[str, ...] = ("full",),
    split: str = "all",
) -> Iterator[Any]:
    """`make(scenes)` for one batch of new scenes after another, the presets in turn, one batch ahead of the caller."""

    def batch(number: int) -> Any:
        indices = range(number * size, (number + 1) * size)
        preset = presets[number % len(presets)]
        return make(draw(indices, seed=TRAINING, preset=preset, split=split))

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        ahead, number = executor.submit(batch, 0), 0
        while True:
            number += 1
            ready, ahead = ahead.result(), executor.submit(batch, number)
            yield ready


def swapped(scene: Scene, seed: int) -> Scene:
    """The scene with one attribute of one object, or the background, replaced by another value."""
    rng = np.random.default_rng(seed)
    number = int(rng.integers(len(scene.things)))
    thing, name = scene.things[number], str(rng.choice([*SWAPS, "background"]))
    if name == "background":
        return scene._replace(background=_other(tuple(BACKGROUNDS), scene.background, rng))
    values = KINDS if name == "kind" else ATTRIBUTES[name]
    if name == "kind":  # a kind names one thing
        values = [k for k in KINDS if k == thing.kind or k not in {t.kind for t in scene.things}]
    thing = thing._replace(**{name: _other(values, getattr(thing, name), rng)})
    return scene._replace(things=(*scene.things[:number], thing, *scene.things[number + 1 :]))


def _other(values: Sequence[str], value: str, rng: np.random.Generator) -> str:
    return str(rng.choice([v for v in values if v != value]))
