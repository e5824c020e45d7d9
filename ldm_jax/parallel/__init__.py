"""How devices form a mesh, and which array lies where on it."""

from ldm_jax.parallel.ahead import one_ahead
from ldm_jax.parallel.chips import peak_flops
from ldm_jax.parallel.compiler import compiler_options, jit
from ldm_jax.parallel.mesh import (
    MeshConfig,
    batch_sharding,
    batch_share,
    check_rows,
    make_mesh,
    put_batch,
    put_same,
    replicated,
)
from ldm_jax.parallel.rules import REPLICATED, device_bytes, leaf_name, shardings

__all__ = [
    "REPLICATED",
    "MeshConfig",
    "batch_sharding",
    "batch_share",
    "check_rows",
    "compiler_options",
    "device_bytes",
    "jit",
    "leaf_name",
    "make_mesh",
    "one_ahead",
    "peak_flops",
    "put_batch",
    "put_same",
    "replicated",
    "shardings",
]
