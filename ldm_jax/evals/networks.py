"""The table of networks that score images: a row per network, found by its name in configs and directories."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ldm_jax.models.clip import CLIPConfig
from ldm_jax.models.dinov2 import Dinov2Config
from ldm_jax.models.inception import InceptionConfig
from ldm_jax.models.lpips import LPIPSConfig
from ldm_jax.models.reader import ReaderConfig


class ScoringNetwork(NamedTuple):
    """A network that scores: the class of its config, and the part of that config that describes its text encoder.

    A network with a text encoder reads prompts by the tokenizer of its own directory.
    """

    config: type
    text: Callable[[Any], Any] | None = None


SCORING = {
    "clip": ScoringNetwork(CLIPConfig, text=lambda config: config.text),
    "reader": ScoringNetwork(ReaderConfig),
    "inception": ScoringNetwork(InceptionConfig),
    "dinov2": ScoringNetwork(Dinov2Config),
    "lpips": ScoringNetwork(LPIPSConfig),
}
