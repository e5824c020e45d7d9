"""CLIP score: the cosine of an image and its prompt in CLIP's shared space (Hessel et al. 2021, arXiv:2104.08718)."""

import numpy as np
from jaxtyping import Float

Unit = Float[np.ndarray, "n P"]


def clip_score(image: Unit, text: Unit) -> Float[np.ndarray, " n"]:
    """The cosine of each image and its prompt, in [-1, 1]; both are of unit norm."""
    return np.sum(np.asarray(image, np.float64) * np.asarray(text, np.float64), axis=-1)


def clip_score_x100(image: Unit, text: Unit) -> Float[np.ndarray, " n"]:
    """max(100 cosine, 0), in [0, 100]: the convention of torchmetrics, and of most papers on images from text.

    Hessel's own, equation 1, has 2.5 for 100.
    """
    return np.maximum(100 * clip_score(image, text), 0)
