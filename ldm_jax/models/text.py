"""Captions -> what conditions a backbone, by the recipe of a pipeline: `RECIPES` has a row for each kind."""

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


class Encoder(NamedTuple):
    """A kind of text encoder.

    Attributes:
      width: of a token, from the network's config.
      length: tokens of a caption, from the network's config.
      fixed: True if the length is chosen here, and not the tokenizer's own.
      run: `run(apply, params, ids, mask)`, the outputs; `mask` is False at padding.
    """

    width: Callable[[Any], int]
    length: Callable[[Any], int]
    fixed: bool
    run: Callable[..., Any]


ENCODERS = {
    CLIPTextConfig: Encoder(
        lambda config: config.hidden_size,
        lambda config: config.max_position_embeddings,
        fixed=False,
        run=lambda apply, params, ids, mask: apply(params, ids),
    ),
    T5Config: Encoder(
        lambda config: config.d_model,
        lambda config: T5_LENGTH,
        fixed=True,
        run=lambda apply, params, ids, mask: apply(params, ids, mask),
    ),
}


class TextRecipe(NamedTuple):
    """How a pipeline makes one condition of the outputs of its text encoders.

    Attributes:
      pipelines: their classes, as model_index.json names them.
      encoders: configs of `text_encoder`, `text_encoder_2`.
      combine: `combine(outputs, mask)`, the condition without the sizes of the images; `mask` is False at padding.
      sized: True if the backbone is told the sizes of the images.
    """

    pipelines: tuple[str, ...]
    encoders: tuple[type, ...]
    combine: Callable[[Sequence[Any], Any], Cond]
    sized: bool


def _last(outputs: Sequence[Any], mask: Any) -> Cond:
    """The last layer of one CLIP, normed."""
    return Cond(outputs[0].last)


def _penultimate(outputs: Sequence[Any], mask: Any) -> Cond:
    """The layers before the last of two CLIPs, side by side, and the projection of the second."""
    both = jnp.concatenate([output.penultimate for output in outputs], axis=-1)
    return Cond(both, pooled=outputs[-1].projected)


def _masked(outputs: Sequence[Any], mask: Any) -> Cond:
    """The last layer of T5, and a mask that hides the padding, which a backbone must not attend to."""
    return Cond(outputs[0], mask)


RECIPES = {
    "clip": TextRecipe(
        ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
        (CLIPTextConfig,),
        _last,
        sized=False,
    ),
    "two clips": TextRecipe(
        ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
        (CLIPTextConfig, CLIPTextConfig),
        _penultimate,
        sized=True,
    ),
    "t5": TextRecipe(("PixArtAlphaPipeline", "PixArtSigmaPipeline"), (T5Config,), _masked, True),
}


def recipe_of(configs: Sequence[Any], pipeline: str | None = None) -> TextRecipe:
    """Finds the recipe of a pipeline's class, or where the class is not known that of the encoders' classes.

    Raises ValueError where there is none, or the pipeline's recipe is of other encoders.
    """
    kinds = tuple(map(type, configs))
    names = " and ".join(kind.__name__.removesuffix("Config") for kind in kinds) or "no encoder"
    for recipe in RECIPES.values():
        if pipeline in recipe.pipelines or (pipeline is None and kinds == recipe.encoders):
            if kinds != recipe.encoders:
                wanted = " and ".join(
                    kind.__name__.removesuffix("Config") for kind in recipe.encoders
                )
                raise ValueError(f"a {pipeline} has the text encoders {wanted}; given are {names}")
            return recipe
    known = ", ".join(name for recipe in RECIPES.values() for name in recipe.pipelines)
    if pipeline is None:
        raise ValueError(f"no pipeline has the text encoders {names}; known are {known}")
    raise ValueError(f"the pipeline is a {pipeline}; supported are {known}")


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

    recipe: TextRecipe
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
        return sum(ENCODERS[type(config)].width(config) for config in self.configs)

    @property
    def pooled_width(self) -> int:
        """Of the pooled text; 0 where there is none."""
        return self.configs[-1].projection_dim if len(self.configs) > 1 else 0

    def encode(self, params: Sequence[Params], tokens: Tokens) -> Cond:
        """Runs every encoder on its own ids and combines the outputs as the recipe says."""
        ends = np.cumsum([tokenizer.max_length for tokenizer in self.tokenizers])
        parts = jnp.split(tokens, ends[:-1], axis=1)
        mask = tokens != self.tokenizers[0].pad_id
        rows = zip(self.configs, self.applies, params, parts, strict=True)
        outputs = [
            ENCODERS[type(config)].run(apply, own, part, mask) for config, apply, own, part in rows
        ]
        cond = self.recipe.combine(outputs, mask)
        return cond._replace(sizes=self._sizes(len(tokens))) if self.recipe.sized else cond

    def _sizes(self, batch: int) -> Any:
        """Height and width of the original, place of the crop, height and width of the image."""
        return jnp.tile(jnp.array([[*[self.size] * 2, 0, 0, *[self.size] * 2]], "f"), (batch, 1))
