"""The inception score (Salimans et al. 2016, arXiv:1606.03498), with an interval and as papers print it."""

import numpy as np
from jaxtyping import Float
from scipy import special

from ldm_jax.metrics.expansion import Expansion, checked
from ldm_jax.types import Estimate

Logits = Float[np.ndarray, "n classes"]


def inception_score(logits: Logits) -> Estimate:
    """exp of the mean divergence KL(p(y|x) || p(y)) over all samples, with its interval.

    The finite set's own p(y) makes the divergence too small by about (classes - 1) / 2n; that bias is taken off.
    Raises ValueError for fewer than two samples and for logits that are not finite.
    """
    return expand_inception_score(logits).estimate()


def inception_score_of_splits(
    logits: Logits, *, splits: int = 10, seed: int = 2020
) -> tuple[float, float]:
    """Mean and deviation over parts of a random order, drawn as torch-fidelity does: the values that papers print.

    A part's score is biased downward, the more the smaller it is. Raises ValueError for fewer samples than parts.
    """
    logits = checked(logits)
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} samples in {splits} splits; each needs at least one")
    order = np.random.RandomState(seed).permutation(len(logits))
    bounds = np.arange(splits + 1) * len(logits) // splits
    parts = np.split(logits[order], bounds[1:-1])
    scores = [np.exp(_divergences(special.softmax(part, axis=1)).mean()) for part in parts]
    return float(np.mean(scores)), float(np.std(scores))


def expand_inception_score(logits: Logits) -> Expansion:
    """The score to second order.

    Its logarithm is H(p(y)) less the mean of H(p(y|x)); only the first is not a plain mean over samples.
    """
    logits = checked(logits)
    count = len(logits)
    if count < 2:
        raise ValueError(f"{count} samples; an interval of the inception score needs two")
    p = special.softmax(logits, axis=1)
    marginal = p.mean(axis=0)
    seen = marginal > 0
    scaled = (p[:, seen] - marginal[seen][None]) / np.sqrt(marginal[seen])[None]
    alone = -np.sum(scaled**2, axis=1) / (2 * count)  # the second order of a sample with itself
    divergences = _divergences(p)
    influence = divergences - 2 * alone
    second = np.sum((scaled.T @ scaled / count) ** 2) / (2 * count**2)
    score = np.exp(divergences.mean() - alone.mean())
    value = score * (1 - influence.var() / (2 * count))  # exp of a noisy mean is too large
    influences = (score * (influence - influence.mean()),)
    bias = np.exp(divergences.mean()) - value
    return Expansion(float(value), float(bias), influences, float(score**2 * second))


def _divergences(p: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, " n"]:
    return np.sum(special.rel_entr(p, p.mean(axis=0)[None]), axis=1)
