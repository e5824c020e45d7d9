"""JAX's attention kernel for TPUs, which keeps the scores in fast memory (Dao et al. 2022, arXiv:2205.14135).

The compiler cannot divide a kernel over devices. So each of them runs one on its own examples and heads: over the axes
`BATCH_AXES` and `TENSOR_AXIS` of the mesh in force (`jax.set_mesh`).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Shaped

from ldm_jax.nn.platform import num_devices, platform
from ldm_jax.types import BATCH_AXES, TENSOR_AXIS, Arr

BLOCK = 128  # tokens that the kernel takes at a time, and multiples of it
AREA = 2**20  # scores that it computes at a time, about


def divides(q: Shaped[Array, "B N K A"]) -> bool:
    """Whether examples and heads divide over the mesh in force, or without one there is one device only."""
    there_is_none = jax.sharding.get_abstract_mesh().empty
    return num_devices() == 1 if there_is_none else _division(q) is not None


def splash(
    q: Float[Array, "B N K A"],
    k: Float[Array, "B L K A"],
    v: Float[Array, "B L K A"],
    mask: Bool[Arr, "B L"] | None,
    bias: Any,
    causal: bool,
    scale: float,
) -> Float[Array, "B N K A"]:
    """`nn.attention.attention` by the kernel; interpreted, and so slow, where there is no TPU.

    Tokens are padded to whole blocks. Raises ValueError for a bias, which the kernel does not take, and for examples or
    heads that do not divide over the mesh.
    """
    if bias is not None:
        raise ValueError("attention with a bias has no implementation 'splash'; use xla or cudnn")
    division = _division(q)
    if division is None:
        raise ValueError(
            f"attention of {q.shape[0]} examples and {q.shape[2]} heads does not divide over the mesh"
            f" {dict(jax.sharding.get_abstract_mesh().shape)} as 'splash' must; use xla"
        )
    (N, L), heads = (q.shape[1], k.shape[1]), PartitionSpec(*division)
    q_BKNA, k_BKLA, v_BKLA = (jnp.moveaxis(_in_blocks(x), 2, 1) for x in (q * scale, k, v))
    seen = None
    if mask is not None or L % BLOCK:
        seen = _in_blocks(jnp.ones((len(q), L), bool) if mask is None else jnp.asarray(mask))
    run = functools.partial(_kernel, causal=causal)
    if any(division):
        specs = heads, heads, heads, PartitionSpec(division[0])
        run = jax.shard_map(run, in_specs=specs, out_specs=heads, check_vma=False)
    out_BKNA = run(q_BKNA, k_BKLA, v_BKLA, seen)
    return jnp.moveaxis(out_BKNA, 1, 2)[:, :N].astype(q.dtype)


def _division(q: Shaped[Array, "B N K A"]) -> tuple[Any, Any] | None:
    """The mesh's axes that divide the examples, and that which divides the heads; None if they cannot."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {
        axis: size for axis, size in mesh.shape.items() if size > 1 and axis not in mesh.manual_axes
    }
    batch = tuple(axis for axis in BATCH_AXES if axis in sizes)
    ways = math.prod(sizes.pop(axis) for axis in batch)
    heads = sizes.pop(TENSOR_AXIS, 1)
    if sizes or q.shape[0] % ways or q.shape[2] % heads:
        return None
    return batch or None, TENSOR_AXIS if heads > 1 else None


def _kernel(
    q_BKNA: Array, k_BKLA: Array, v_BKLA: Array, seen: Array | None, *, causal: bool
) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention  # it imports all of Pallas

    _, K, N, A = q_BKNA.shape
    shape = N, k_BKLA.shape[2]
    segments = None
    if seen is not None:
        queries = jnp.ones((len(seen), N), jnp.int32)
        segments = splash_attention.SegmentIds(queries, seen.astype(jnp.int32))
    mask = splash_attention.CausalMask(shape) if causal else splash_attention.FullMask(shape)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * K),
        block_sizes=_blocks(splash_attention, *shape, A),
        head_shards=1,
        q_seq_shards=1,
        interpret=platform() != "tpu",
    )
    return jax.vmap(kernel)(q_BKNA, k_BKLA, v_BKLA, segments)


def _in_blocks(x: Shaped[Array, "B L *rest"]) -> Shaped[Array, "B M *rest"]:
    """Tokens padded with zeros to whole blocks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK), *[(0, 0)] * (x.ndim - 2)))


def _blocks(splash_attention: Any, N: int, L: int, A: int) -> Any:
    """The largest that divide the tokens and fit the fast memory, for the forward and the backward kernel.

    The latter writes a part of the queries' gradient for every block of keys, and adding these up costs as much as
    the kernel: so it takes all the keys at once, up to 4096, for which there is room if tokens lie innermost.
    """

    def largest(tokens: int, most: int) -> int:
        return max(size for size in range(BLOCK, max(most, BLOCK) + 1, BLOCK) if tokens % size == 0)

    wide = -(-A // 128)
    rows, backward_rows = (min(2048, max(least, AREA // L)) // wide for least in (1024, 256))
    inner = largest(L, 256)
    innermost = splash_attention.QKVLayout.SEQ_MINOR
    return splash_attention.BlockSizes(
        **{"block_q": largest(N, rows), "block_q_dkv": largest(N, backward_rows)},
        **{"block_kv": largest(L, 1024), "block_kv_dkv": largest(L, 4096 // wide)},
        **{"block_kv_compute": inner, "block_kv_dkv_compute": inner},
        **{"q_layout": innermost, "k_layout": innermost, "v_layout": innermost},
        use_fused_bwd_kernel=True,
    )
