"""Prompt sets: fixed lists of prompts that a model is evaluated on."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ldm_jax.data.scenes import Scene, Scenes, captions
from ldm_jax.data.sources import open_source

SEEN, HELD_OUT = "seen", "held out"
SEED = 2**31 + 1  # no source of training scenes has it by default


class Prompts(NamedTuple):
    """Prompts in their order, whose numbers fix their noise.

    `groups` names the part that each belongs to; `scenes` are the graphs that they describe, where they do.
    """

    texts: tuple[str, ...]
    groups: tuple[str, ...]
    scenes: tuple[Scene, ...] = ()


def read_prompts(spec: str, captions_of_data: Callable[[int], Sequence[str]]) -> Prompts:
    """The prompts of `captions:64`, `file:PATH` (one a line, blank lines left out) or `scenes:PRESET?count=64`.

    `captions_of_data(count)` gives the first captions of the run's own data. Half of the scenes' prompts, every other
    one, name a pair of kind and colour that training never shows; they are the dense captions.

    Raises:
      ValueError: no such prompt set, no prompt in it.
      FileNotFoundError: no such file.
    """
    name, _, argument = spec.partition(":")
    if name == "scenes":
        return _of_scenes(open_source(spec))
    if name == "file":
        lines = Path(argument).read_text(encoding="utf-8").splitlines()
        texts = tuple(line.strip() for line in lines if line.strip())
        if not texts:
            raise ValueError(f"{argument} holds no prompt: one a line is read")
    elif name == "captions" and argument.isdecimal() and int(argument):
        texts = tuple(captions_of_data(int(argument)))
    else:
        raise ValueError(
            f"eval.prompts is {spec!r}; allowed are captions:COUNT, file:PATH and scenes:PRESET?count=64"
        )
    return Prompts(texts, ("",) * len(texts))


def _of_scenes(source: Scenes) -> Prompts:
    seed = source.seed or SEED
    halves = [
        dataclasses.replace(source, split=split, seed=seed) for split in ("train", "held_out")
    ]
    scenes = tuple(halves[number % 2].scene(number // 2) for number in range(source.count))
    groups = tuple((SEEN, HELD_OUT)[number % 2] for number in range(source.count))
    return Prompts(tuple(captions(scene)[0] for scene in scenes), groups, scenes)
