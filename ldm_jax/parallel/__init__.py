"""How devices form a mesh, and which array lies where on it."""

from ldm_jax.parallel.compiler import compiler_options, jit
from ldm_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh, peak_flops, put_batch
from ldm_jax.parallel.rules import REPLICATED, leaf_name, shardings

__all__ = [
    "REPLICATED",
    "MeshConfig",
    "batch_sharding",
    "compiler_options",
    "jit",
    "leaf_name",
    "make_mesh",
    "peak_flops",
    "put_batch",
    "shardings",
]
