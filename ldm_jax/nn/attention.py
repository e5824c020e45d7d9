"""Attention: every network goes through this one function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from ldm_jax.nn.platform import num_devices, platform
from ldm_jax.nn.splash import divides, splash
from ldm_jax.types import Arr

SPLASH_QUERIES = 1024  # from so many on scores are worth keeping out of memory
CHUNKED_SCORES = 2**18  # as many of a head are, on CPUs
CHUNK = 2**20  # scores that these take at a time: 4 MB, which their caches hold

Q = Float[Array, "B N K A"]
KV = Float[Array, "B L K A"]
Mask = Bool[Arr, "B L"] | None
Bias = Float[Arr, "#B K N L"] | None


def attention(
    q: Q,
    k: KV,
    v: KV,
    *,
    mask: Mask = None,
    bias: Bias = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str = "auto",
) -> Q:
    """softmax(scale q k^T + bias) v for each head; Vaswani et al. (2017), arXiv:1706.03762, equation 1.

    `scale` is positive, and 1 / sqrt(A) unless it is given; `bias` is each example's own, or one for all of them.
    `mask` says which keys may be attended to; `causal` lets query n see the keys up to n only. Scores, their
    maximum and their sum are float32 whatever the dtype of the inputs, which is the dtype of the result.
    `implementation` is a row of IMPLEMENTATIONS, or "auto", which takes the best that the platform has for these
    inputs: that of the mesh in force (`jax.set_mesh`), else the default backend. Raises ValueError for another
    name, and whatever a forced implementation raises for inputs that it does not support.
    """
    name = _best(q, k, mask, bias, causal) if implementation == "auto" else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation is {name!r}; it can be auto, {', '.join(IMPLEMENTATIONS)}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return IMPLEMENTATIONS[name](q, k, v, mask, bias, causal, scale)


def _best(q: Q, k: KV, mask: Mask, bias: Bias, causal: bool) -> str:
    """cuDNN refuses float32 and odd head widths, and in training a mask or a bias over an odd number of keys."""
    half, width = q.dtype in (jnp.bfloat16, jnp.float16), q.shape[-1]
    alike, many = mask is None and bias is None, q.shape[1] * k.shape[1] >= CHUNKED_SCORES
    match platform():
        case "gpu" if half and width % 8 == 0 and width <= 128 and alike:
            return "cudnn"
        case "tpu" if half and width <= 256 and q.shape[1] >= SPLASH_QUERIES and bias is None:
            return "splash" if divides(q) else "xla"
        case "cpu" if alike and not causal and many and num_devices() == 1:
            return "chunked"
    return "xla"


def _xla(q: Q, k: KV, v: KV, mask: Mask, bias: Bias, causal: bool, scale: float) -> Q:
    """Heads first and the division last: on CPUs up to three times as fast as jax.nn's, from 256 tokens on."""
    q_BKNA, k_BKLA, v_BKLA = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
    score_BKNL = jnp.matmul(q_BKNA, k_BKLA.mT, preferred_element_type=jnp.float32)
    if bias is not None:
        score_BKNL += bias.astype(jnp.float32) / scale
    score_BKNL = _hide(score_BKNL, mask, causal)
    # The result does not depend on what is subtracted, so neither does its gradient.
    top_BKN1 = jax.lax.stop_gradient(jnp.max(score_BKNL, axis=-1, keepdims=True))
    # Scaled after the subtraction: before it, a fused multiply-subtract leaves the rounding error of `top`
    # in the exponent, which overflows where scores are huge.
    weight_BKNL = jnp.exp((score_BKNL - top_BKN1) * scale)
    total_BKN1 = jnp.sum(weight_BKNL, axis=-1, keepdims=True)
    out_BKNA = jnp.matmul(weight_BKNL.astype(v.dtype), v_BKLA, preferred_element_type=jnp.float32)
    return jnp.moveaxis((out_BKNA / total_BKN1).astype(q.dtype), 1, 2)


def _chunked(q: Q, k: KV, v: KV, mask: Mask, bias: Bias, causal: bool, scale: float) -> Q:
    """`_xla` for one head and some of its queries at a time, CHUNK scores, which the caches of CPUs hold.

    The backward pass computes them again (Rabe & Staats 2021, arXiv:2112.05682). Raises ValueError where not every
    query sees all keys alike.
    """
    if mask is not None or bias is not None or causal:
        raise ValueError("attention 'chunked' takes no mask and no bias and is not causal; use xla")
    B, N = q.shape[:2]
    num_chunks = -(-N * k.shape[1] // CHUNK)
    padding = -N % num_chunks
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    chunks = rearrange(q, "B (chunks n) K A -> (B K) chunks 1 n 1 A", chunks=num_chunks)
    k, v = (rearrange(x, "B L K A -> (B K) 1 L 1 A") for x in (k, v))

    def of_head(head: tuple[Array, Array, Array]) -> Array:
        chunks, k, v = head
        attend = lambda q: _xla(q, k, v, None, None, False, scale)  # noqa: E731
        return jax.lax.map(jax.checkpoint(attend, prevent_cse=False), chunks)

    out = jax.lax.map(of_head, (chunks, k, v))
    return rearrange(out, "(B K) chunks 1 n 1 A -> B (chunks n) K A", B=B)[:, :N]


def _hide(score_BKNL: Float[Array, "B K N L"], mask: Mask, causal: bool) -> Float[Array, "B K N L"]:
    """The lowest score that stays finite, so that a row with nothing to see gives no NaN."""
    lowest = jnp.finfo(jnp.float32).min
    if mask is not None:
        score_BKNL = jnp.where(mask[:, None, None, :], score_BKNL, lowest)
    if causal:
        seen_NL = jnp.tri(*score_BKNL.shape[-2:], dtype=bool)
        score_BKNL = jnp.where(seen_NL[None, None], score_BKNL, lowest)
    return score_BKNL


def _cudnn(q: Q, k: KV, v: KV, mask: Mask, bias: Bias, causal: bool, scale: float) -> Q:
    if mask is not None:
        mask = jnp.broadcast_to(mask[:, None, None, :], (len(q), 1, q.shape[1], k.shape[1]))
    if bias is not None:
        bias = bias.astype(q.dtype)
    return jax.nn.dot_product_attention(
        q, k, v, bias, mask, scale=scale, is_causal=causal, implementation="cudnn"
    )


IMPLEMENTATIONS: dict[str, Callable[[Q, KV, KV, Mask, Bias, bool, float], Q]] = {
    "xla": _xla,
    "chunked": _chunked,
    "cudnn": _cudnn,
    "splash": splash,
}
