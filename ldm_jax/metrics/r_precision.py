"""CLIP R-precision: is an image's own prompt the nearest to it among many?

R-precision is of Xu et al. 2018 (AttnGAN, arXiv:1711.10485), and in CLIP's space of Park et al. 2021 ("Benchmark for
compositional text-to-image synthesis"). Both ask among 100 prompts: the own one and 99 that are drawn.
"""

import numpy as np
from jaxtyping import Float, Int

TIE = 1e-6  # of cosines: what float32 features may be off by


def r_precision(
    image: Float[np.ndarray, "n P"],
    text: Float[np.ndarray, "n P"],
    *,
    candidates: int = 100,
    seed: int = 0,
) -> Float[np.ndarray, " n"]:
    """For each image 1 where the cosine with its own prompt is the largest among the candidates', else 0.

    Features are of unit norm. A tie, to within 1e-6, is a miss; where a cosine is NaN, so is the hit. Candidates are
    the own prompt and others drawn without repetition, all of them where there are fewer. A draw hangs on the seed, the
    number of prompts and the image's own number: in another order others are drawn, unless all are candidates. Chance
    is 1 / candidates, so compare equal numbers of them only.
    Raises ValueError for fewer than two prompts or candidates.
    """
    image, text = np.asarray(image, np.float64), np.asarray(text, np.float64)
    others = drawn(len(text), candidates, seed)
    own = np.sum(image * text, axis=-1)
    nearest = np.array([np.max(text[row] @ x) for row, x in zip(others, image, strict=True)])
    return np.where(np.isnan(own - nearest), np.nan, own - nearest > TIE)


def drawn(count: int, candidates: int, seed: int) -> Int[np.ndarray, "count others"]:
    """For each prompt the numbers of the others it is compared with: none is its own, and none repeats in a row.

    Raises ValueError for fewer than two prompts or candidates.
    """
    if min(count, candidates) < 2:
        raise ValueError(
            f"{count} prompts and {candidates} candidates; R-precision needs two or more of both"
        )
    rows = [
        np.random.default_rng((seed, number)).choice(
            count - 1, min(candidates, count) - 1, replace=False, shuffle=False
        )
        for number in range(count)
    ]
    return np.array([row + (row >= number) for number, row in enumerate(rows)])
