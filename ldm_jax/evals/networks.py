"""The table of networks that score images: a row per network, found by its name in configs and directories."""

from collections.abc import Callable, Mapping
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


NEED_OTHERS = (
    "Scores by embedded networks, which know scenes only, mean nothing for other images: give eval.networks.NAME"
    " the directory of a network for such images. Embedded here: %s."
)


def embedded_on_foreign(config: Mapping[str, Any]) -> list[str]:
    """Names the embedded networks that would score other images than the scenes that they know, by a run's config."""
    given = config.get("eval", {}).get("networks", {})
    source = config.get("data", {}).get("source", "scenes:")
    if config.get("pretrained") != "embedded" or source.partition(":")[0] == "scenes":
        return []
    return [name for name in ("clip", "reader") if not given.get(name)]


SCORING = {
    "clip": ScoringNetwork(CLIPConfig, text=lambda config: config.text),
    "reader": ScoringNetwork(ReaderConfig),
    "inception": ScoringNetwork(InceptionConfig),
    "dinov2": ScoringNetwork(Dinov2Config),
    "lpips": ScoringNetwork(LPIPSConfig),
}
