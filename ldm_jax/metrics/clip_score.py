"""CLIP score: the cosine between an image and its prompt in CLIP's shared space (arXiv 2104.08718)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from ldm_jax.metrics.estimate import by_group
from ldm_jax.models.clip import preprocess, unit_norm
from ldm_jax.types import Estimate, Images, Params, Tokens


@dataclasses.dataclass(frozen=True)
class CLIPScore:
    """`features` on the mesh, `result` on the host.

    Attributes:
      apply: a CLIP as `functional(CLIP)` gives it.
      size: side of the images that its image tower takes, in pixels.
    """

    apply: Any
    size: int

    def features(
        self, params: Params, images: Images, tokens: Tokens
    ) -> dict[str, Float[Array, "B P"]]:
        """Unit features of images in [-1, 1] and of prompts, in float32; `tokens` are CLIP's own."""
        seen = self.apply(params, preprocess(images, self.size), method="image_features")
        told = self.apply(params, tokens, method="text_features")
        return {"image": unit_norm(seen), "text": unit_norm(told)}

    def result(
        self, features: dict[str, Float[np.ndarray, "n P"]], groups: Sequence[str]
    ) -> dict[str, Estimate]:
        """The mean cosine over prompts and over each group; times 100 in the convention of torchmetrics."""
        image, text = (np.asarray(features[name], np.float64) for name in ("image", "text"))
        return by_group("clip_score", np.sum(image * text, axis=-1), groups)
