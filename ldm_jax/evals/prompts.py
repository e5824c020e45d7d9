"""Prompts: fixed lists that a model is evaluated on."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ldm_jax.data.scenes import Scene, Scenes, captions
from ldm_jax.data.sources import open_source
from ldm_jax.data.text import numbered_lines
from ldm_jax.evals.prompt_sets import PROMPT_SETS, decode_file, read_set

SEEN, HELD_OUT = "seen", "held out"
SEED = 2**31 + 1  # no source of training scenes has it by default


class Prompts(NamedTuple):
    """Prompts in their order, whose numbers fix their noise.

    `groups` names the part that each belongs to; `scenes` are the graphs that they describe, where they do.
    """

    texts: tuple[str, ...]
    groups: tuple[str, ...]
    scenes: tuple[Scene, ...] = ()

    @property
    def digest(self) -> str:
        """An identity of the texts in their order: the first 16 digits of `sha256sum` of a file with one a line."""
        return hashlib.sha256("".join(f"{text}\n" for text in self.texts).encode()).hexdigest()[:16]


def read_prompts(spec: str, captions_of_data: Callable[[int], Sequence[str]]) -> Prompts:
    """The prompts of `captions:64`, `scenes:PRESET?count=64` or a file, `name:PATH` with a row of `PROMPT_SETS`.

    `captions_of_data(count)` gives the first captions of the run's own data. Half of the scenes' prompts, every other
    one, name a pair of kind and colour that training never shows; they are the dense captions.

    Raises:
      ValueError: no such prompt set, no prompt in it, or what `prompt_sets.read_set` raises.
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
    if name in PROMPT_SETS:
        rows = read_set(spec)
        return Prompts(tuple(row.text for row in rows), tuple(row.group for row in rows))
    if name == "captions" and argument.isdecimal() and int(argument):
        texts = tuple(captions_of_data(int(argument)))
        return Prompts(texts, ("",) * len(texts))
    released = ", ".join(f"{name}:PATH" for name in PROMPT_SETS if name != "file")
    raise ValueError(
        f"eval.prompts is {spec!r}; allowed are captions:COUNT, file:PATH and scenes:PRESET?count=64,"
        f" and of released sets {released}"
    )


def read_lines(path: Path) -> tuple[str, ...]:
    """The prompts of a text file in UTF-8, one a line, also several times; blank lines are left out.

    Raises:
      ValueError: there is none, or the file is not UTF-8.
      FileNotFoundError: no such file.
    """
    texts = tuple(text for _, text in numbered_lines(decode_file(path.read_bytes(), path)))
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
