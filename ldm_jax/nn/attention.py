"""Attention: every network goes through this one function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from ldm_jax.types import Arr

BLOCK = 128  # tokens that the TPU's kernel takes at a time, and multiples of it
SPLASH_TOKENS = 1024  # from so many queries and keys on its scores are worth keeping out of memory

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
    name = _best(q, k, mask, bias) if implementation == "auto" else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation is {name!r}; it can be auto, {', '.join(IMPLEMENTATIONS)}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return IMPLEMENTATIONS[name](q, k, v, mask, bias, causal, scale)


def _best(q: Q, k: KV, mask: Mask, bias: Bias) -> str:
    """cuDNN refuses float32 and odd head widths, and in training a mask or a bias over an odd number of keys.

    The compiler cannot divide a kernel of TPUs over devices, and raises where it would have to.
    """
    (platform, devices), half = _platform(), q.dtype in (jnp.bfloat16, jnp.float16)
    fits = half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and mask is None and bias is None
    if platform == "gpu" and fits:
        return "cudnn"
    many = min(q.shape[1], k.shape[1]) >= SPLASH_TOKENS
    whole = platform == "tpu" and devices == 1
    return "splash" if whole and half and many and bias is None else "xla"


def _platform() -> tuple[str, int]:
    """The kind and the number of the devices of the mesh in force, or of all there are."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.abstract_device:
        return mesh.abstract_device.platform, mesh.size
    return jax.default_backend(), jax.device_count()


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


def _splash(q: Q, k: KV, v: KV, mask: Mask, bias: Bias, causal: bool, scale: float) -> Q:
    """JAX's kernel for TPUs, which keeps the scores in fast memory (Dao et al. 2022, arXiv:2205.14135); slow elsewhere.

    Tokens are padded to whole blocks. Raises ValueError for a bias, which the kernel does not take.
    """
    from jax.experimental.pallas.ops.tpu import (
        splash_attention as splash,
    )  # it imports all of Pallas

    if bias is not None:
        raise ValueError("attention with a bias has no implementation 'splash'; use xla or cudnn")
    N, L = q.shape[1], k.shape[1]
    q_BKNA, k_BKLA, v_BKLA = (jnp.moveaxis(_in_blocks(x), 2, 1) for x in (q * scale, k, v))
    segments = None
    if mask is not None or L % BLOCK:
        seen = jnp.ones((len(q), L), bool) if mask is None else mask
        queries = jnp.ones((len(q), q_BKNA.shape[2]), jnp.int32)
        segments = splash.SegmentIds(queries, _in_blocks(seen).astype(jnp.int32))
    shape = q_BKNA.shape[2], k_BKLA.shape[2]
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask(
            [splash.CausalMask(shape) if causal else splash.FullMask(shape)] * q.shape[2]
        ),
        block_sizes=_blocks(splash, *shape, q.shape[3]),
        head_shards=1,
        q_seq_shards=1,
        interpret=_platform()[0] != "tpu",
    )
    out_BKNA = jax.vmap(kernel)(q_BKNA, k_BKLA, v_BKLA, segments)
    return jnp.moveaxis(out_BKNA, 1, 2)[:, :N].astype(q.dtype)


def _in_blocks(x: Shaped[Arr, "B L *rest"]) -> Shaped[Arr, "B M *rest"]:
    """Tokens padded with zeros to whole blocks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK), *[(0, 0)] * (x.ndim - 2)))


def _blocks(splash: Any, N: int, L: int, A: int) -> Any:
    """The largest that divide the tokens and fit the fast memory, for the forward and the backward kernel.

    The latter writes a part of the queries' gradient for every block of keys, and adding these up costs as much as
    the kernel: so it takes all the keys at once, up to 4096, for which there is room if tokens lie innermost.
    """
    wide = max(1, -(-A // 128))
    rows, few_rows, columns, inner, all_columns = (
        max(size for size in range(BLOCK, most + 1, BLOCK) if tokens % size == 0)
        for tokens, most in ((N, 1024), (N, 256), (L, 1024), (L, 256), (L, 4096 // wide))
    )
    innermost = splash.QKVLayout.SEQ_MINOR
    return splash.BlockSizes(
        **{"block_q": rows, "block_kv": columns, "block_kv_compute": inner},
        **{"block_q_dkv": few_rows, "block_kv_dkv": all_columns, "block_kv_dkv_compute": inner},
        **{"q_layout": innermost, "k_layout": innermost, "v_layout": innermost},
        use_fused_bwd_kernel=True,
    )


IMPLEMENTATIONS: dict[str, Callable[[Q, KV, KV, Mask, Bias, bool, float], Q]] = {
    "xla": _xla,
    "cudnn": _cudnn,
    "splash": _splash,
}
