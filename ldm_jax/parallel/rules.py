"""Which array lies where: a table and rules, and no metadata on the parameters.

A *table* (`ldm_jax.models.axes`) names the last dims of parameters by what they mean:

    TABLE = (
        (r"(query|key|value)/kernel", ("embed", "heads")),
        (r"up/kernel", ("embed", "ffn")),
        (r".*", REPLICATED),
    )

*Rules*, which stand in the config, say which axis of the mesh divides them, the most important first:

    (("heads", "tensor"), ("ffn", "tensor"), ("embed", "fsdp"))

A row's pattern must match the end of a path, from the start of one of its names. So one table places
`blocks/up/kernel` among the parameters, `ema/blocks/up/kernel` in the average of them and
`opt_state/1/0/mu/blocks/up/kernel` among the moments of the optimiser.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Table = Sequence[tuple[str, tuple[str | None, ...]]]
Rules = Sequence[tuple[str, str]]

REPLICATED = ()


def shardings(tree: Any, table: Table, rules: Rules, mesh: Mesh) -> Any:
    """The same tree with a `NamedSharding` for each leaf, by the first row that matches its path.

    Leaves need `shape` only, so `jax.eval_shape` will do. A rule gives its axis to the dim of that name, unless the
    axis divides another dim of the leaf already, or the dim is divided, or does not divide by the axis: then the next
    rule is tried. So a leaf that no rule fits stays whole; `device_bytes` tells what that costs.

    Raises:
      ValueError: no row matches a path, the row names more dims than the leaf has, or a rule is of an axis that the
        mesh or a name that the table does not have.
    """
    _check(table, rules, mesh)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        axes = _axes(_names(leaf_name(path), tuple(leaf.shape), table), leaf.shape, rules, mesh)
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(place, tree)


def device_bytes(tree: Any) -> int:
    """What one device holds of a tree of arrays or ShapeDtypeStructs that are placed; of all of it where one is not."""

    def held(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return jax.ShapeDtypeStruct(shape, leaf.dtype).size * leaf.dtype.itemsize

    return sum(map(held, jax.tree.leaves(tree)))


def leaf_name(path: tuple[Any, ...]) -> str:
    """The path of a leaf in a pytree as one string: `params/blocks/0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _names(path: str, shape: tuple[int, ...], table: Table) -> tuple[str | None, ...]:
    """What the dims of a leaf are called."""
    for pattern, names in table if shape else ():
        if re.search(f"(?:^|/)(?:{pattern})$", path):
            if len(names) > len(shape):
                raise ValueError(
                    f"the row {pattern!r} of the table of axes names {len(names)} dims {names}, and {path} has the"
                    f" shape {shape}"
                )
            return (None,) * (len(shape) - len(names)) + tuple(names)
    if not shape:
        return ()
    raise ValueError(
        f"no row of the table of axes matches {path} with the shape {shape}; add one, or end the table with"
        " ('.*', REPLICATED)"
    )


def _axes(
    names: Sequence[str | None], shape: Sequence[int], rules: Rules, mesh: Mesh
) -> list[str | None]:
    axes: list[str | None] = [None] * len(names)
    for name, axis in rules:
        if axis in axes or mesh.shape[axis] == 1:
            continue
        for dim, size in enumerate(shape):
            if names[dim] == name and axes[dim] is None and size % mesh.shape[axis] == 0:
                axes[dim] = axis
                break
    return axes


def _check(table: Table, rules: Rules, mesh: Mesh) -> None:
    known = {name for _, names in table for name in names if name}
    for name, axis in rules:
        if name not in known or axis not in mesh.axis_names:
            raise ValueError(
                f"there is no rule {name}={axis}: dims are called {', '.join(sorted(known))}, and the mesh has the axes"
                f" {', '.join(mesh.axis_names)}"
            )
