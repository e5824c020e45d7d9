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
        if "split=" in spec:
            raise ValueError(
                f"eval.prompts is {spec!r}; it takes no split: half of the prompts are held out, half are not"
            )
        return _of_scenes(
            open_source(spec if "seed=" in spec else _with_option(spec, f"seed={SEED}"))
        )
    if name == "file":
        texts = read_lines(Path(argument))
    elif name == "captions" and argument.isdecimal() and int(argument):
        texts = tuple(captions_of_data(int(argument)))
    else:
        raise ValueError(
            f"eval.prompts is {spec!r}; allowed are captions:COUNT, file:PATH and scenes:PRESET?count=64"
        )
    return Prompts(texts, ("",) * len(texts))


def read_lines(path: Path) -> tuple[str, ...]:
    """The prompts of a text file in UTF-8, one a line; blank lines are left out.

    Raises:
      ValueError: there is none, or the file is not UTF-8.
      FileNotFoundError: no such file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    texts = tuple(line.strip() for line in lines if line.strip())
    if not texts:
        raise ValueError(f"{path} holds no prompt: one a line is read")
    return texts


def _with_option(spec: str, option: str) -> str:
    return f"{spec}{'&' if '?' in spec else '?'}{option}"


def _of_scenes(source: Scenes) -> Prompts:
    halves = [dataclasses.replace(source, split=split) for split in ("train", "held_out")]
    scenes = tuple(halves[number % 2].scene(number // 2) for number in range(source.count))
    groups = tuple((SEEN, HELD_OUT)[number % 2] for number in range(source.count))
    return Prompts(tuple(captions(scene)[0] for scene in scenes), groups, scenes)
