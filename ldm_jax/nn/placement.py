"""Where arrays lie while a network runs on a mesh in force (`jax.set_mesh`) with the axes of `types`.

Parameters are stored in parts. A layer gathers its kernel when it needs it, in the precision that it computes in, and
the backward pass gathers it again (ZeRO-3: Rajbhandari et al. 2020, arXiv:1910.02054, section 5.3). Heads and the inner
width of feed-forward layers may be divided (Shoeybi et al. 2019, arXiv:1909.08053, section 3). Layers have to say so:
left to itself, the compiler divides the products, and moves activations instead of weights.
"""

import functools
import math
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from ldm_jax.types import BATCH_AXES, PARAMETER_AXIS, TENSOR_AXIS

Axes = str | tuple[str, ...] | None


def in_parts() -> bool:
    """Whether the mesh in force divides parameters; if not, nothing here changes a program."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or set(mesh.axis_types) != {AxisType.Auto}:
        return False
    sizes = dict(mesh.shape)
    if not {*BATCH_AXES, TENSOR_AXIS} <= sizes.keys():
        return False
    return sizes[PARAMETER_AXIS] * sizes[TENSOR_AXIS] > 1


def gathered(kernel: Array, *axes: Axes) -> Array:
    """A kernel with its leading dims divided over `axes` and else whole; its gradient may lie anywhere."""
    return _gathered(axes, kernel) if in_parts() else kernel


def by_example(tree: Any) -> Any:
    """Activations [B, ...], examples divided and else whole."""
    return jax.tree.map(lambda x: _lying(x, (BATCH_AXES,)), tree) if in_parts() else tree


def dividing(num_heads: int) -> str | None:
    """The axis of the mesh that divides so many heads, if it does."""
    return _fitting(num_heads, TENSOR_AXIS) if in_parts() else None


# The constraint's own rule would want the gradient whole, and then the compiler reduces it to every device.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(axes: tuple[Axes, ...], kernel: Array) -> Array:
    return _lying(kernel, axes)


_gathered.defvjp(lambda axes, kernel: (_lying(kernel, axes), None), lambda axes, _, g: (g,))


def _lying(x: Array, axes: tuple[Axes, ...]) -> Array:
    fitting = map(_fitting, x.shape, axes)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting))


def _fitting(size: int, axes: Axes) -> Axes:
    """The axes, if they divide so many."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    names = (axes,) if isinstance(axes, str) else axes or ()
    return axes if size % math.prod(sizes[name] for name in names) == 0 else None
