"""Captions -> what conditions a backbone: one CLIP (Stable Diffusion), two of them (SDXL), or T5 (PixArt)."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ldm_jax.models.clip import CLIPTextConfig
from ldm_jax.models.t5 import T5Config
from ldm_jax.models.tokenizer import Tokenizer
from ldm_jax.types import Cond, Params, Tokens

T5_LENGTH = 120  # tokens of a caption that PixArt was trained with; T5 itself has no limit
CUTS_SHOWN = 5  # prompts that lose their end and are shown


class Ids(NamedTuple):
    """What a network has to know of a tokenizer; a plan has no more of it."""

    max_length: int
    pad_id: int = 0

    def __call__(self, captions: Sequence[str]) -> Tokens:
        """Returns the ids of empty captions, of which a plan reads the shape."""
        return np.full((len(captions), self.max_length), self.pad_id, np.int32)


def warn_of_truncation(prompts: Iterable[str], text: "Text") -> None:
    """Shows what of prompts no text encoder sees: of many the first few, and how many more there are."""
    cuts = [cut for prompt in dict.fromkeys(prompts) if (cut := text.truncated(prompt))]
    for cut in cuts[:CUTS_SHOWN]:
        logging.warning("The text encoder does not see the end of a prompt: %r", cut)
    if more := len(cuts[CUTS_SHOWN:]):
        logging.warning("Nor does it see the end of %d prompts more.", more)


@dataclasses.dataclass(frozen=True)
class Text:
    """The text encoders of one pipeline, taken as one; the fields have an element each.

    `size` is the side of the images in pixels. Networks that are conditioned on sizes (SDXL, PixArt at 1024 pixels)
    are told that images had it from the start and were not cropped.
    """

    tokenizers: tuple[Tokenizer | Ids, ...]
    configs: tuple[CLIPTextConfig | T5Config, ...]
    applies: tuple[Callable[..., Any], ...]
    size: int

    def __call__(self, captions: Sequence[str]) -> Tokens:
        """The ids of every tokenizer, side by side: [B, L], or [B, L + L] where there are two."""
        return np.concatenate([tokenizer(captions) for tokenizer in self.tokenizers], axis=1)

    def truncated(self, caption: str) -> str:
        """The part of the caption that no encoder sees; mostly nothing."""
        return min((tokenizer.truncated(caption) for tokenizer in self.tokenizers), key=len)

    @property
    def width(self) -> int:
        """Of a token."""
        return sum(
            config.d_model if isinstance(config, T5Config) else config.hidden_size
            for config in self.configs
        )

    @property
    def pooled_width(self) -> int:
        """Of the pooled text; 0 where there is none."""
        return self.configs[-1].projection_dim if len(self.configs) > 1 else 0

    def encode(self, params: Sequence[Params], tokens: Tokens) -> Cond:
        """One CLIP: its last layer, normed. Two: the layers before the last, side by side, and the second's projection.

        T5: its last layer, and a mask that hides the padding, which a backbone must not attend to.
        """
        if isinstance(self.configs[0], T5Config):
            mask = tokens != self.tokenizers[0].pad_id
            last = self.applies[0](params[0], tokens, mask)
            return Cond(last, mask, sizes=self._sizes(len(tokens)))
        ends = np.cumsum([tokenizer.max_length for tokenizer in self.tokenizers])
        parts = jnp.split(tokens, ends[:-1], axis=1)
        outputs = [self.applies[i](params[i], part) for i, part in enumerate(parts)]
        if len(outputs) == 1:
            return Cond(outputs[0].last)
        both = jnp.concatenate([output.penultimate for output in outputs], axis=-1)
        return Cond(both, pooled=outputs[-1].projected, sizes=self._sizes(len(tokens)))

    def _sizes(self, batch: int) -> Any:
        """Height and width of the original, place of the crop, height and width of the image."""
        return jnp.tile(jnp.array([[*[self.size] * 2, 0, 0, *[self.size] * 2]], "f"), (batch, 1))
