"""Which array lies where: two tables, and no metadata on the parameters.

A *table* stands in a model's file. Its rows name the dimensions of parameters by what they mean:

    TABLE = (
        (r"attention/(query|key|value)/kernel", ("layers", "embed", "heads")),
        (r"mlp/up/kernel", ("layers", "embed", "ffn")),
        (r".*", REPLICATED),
    )

*Rules* stand in the config and say which axis of the mesh divides them:

    {"embed": "fsdp", "ffn": "tensor", "heads": "tensor", "layers": None}

and rules that are all None make a model that every device holds whole. A row's pattern must match
the end of a path, from the start of one of its names. So one table places `blocks/mlp/up/kernel`
among the parameters, `ema/blocks/mlp/up/kernel` in the average of them and
`opt_state/1/0/mu/blocks/mlp/up/kernel` among the moments of the optimiser.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axes = str | tuple[str, ...] | None
Table = Sequence[tuple[str, tuple[str | None, ...] | None]]
Rules = Mapping[str, Axes]

REPLICATED = None


def shardings(tree: Any, table: Table, rules: Rules, mesh: Mesh) -> Any:
    """The same tree with a `NamedSharding` for each leaf, by the first row that matches its path.

    Leaves need `shape` only, so `jax.eval_shape` will do. Scalars are replicated and need no row.

    Raises:
      ValueError: no row matches a path, the row has another rank than the leaf, a logical axis has
        no rule, two dimensions would share an axis of the mesh, or a dimension does not divide by
        its axis. Nothing is replicated unless a row or a rule says so, because a large tensor that
        every device holds whole is a memory error that shows late.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name, shape = leaf_name(path), tuple(leaf.shape)
        logical = _row(name, shape, table) if shape else REPLICATED
        if logical is REPLICATED:
            return NamedSharding(mesh, PartitionSpec())
        axes = tuple(_axes(name, axis, rules, mesh) for axis in logical)
        _check(name, shape, axes, mesh)
        return NamedSharding(mesh, PartitionSpec(*(axis or None for axis in axes)))

    return jax.tree_util.tree_map_with_path(place, tree)


def leaf_name(path: tuple[Any, ...]) -> str:
    """The path of a leaf in a pytree as one string: `params/blocks/0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _row(name: str, shape: tuple[int, ...], table: Table) -> tuple[str | None, ...] | None:
    for pattern, logical in table:
        if re.search(f"(?:^|/)(?:{pattern})$", name):
            if logical is not REPLICATED and len(logical) != len(shape):
                raise ValueError(
                    f"The sharding row {pattern!r} names {len(logical)} dimensions {logical}, but "
                    f"{name} has the shape {shape}."
                )
            return logical
    raise ValueError(
        f"No row of the sharding table matches {name} with the shape {shape}: add one, or end the "
        f"table with ('.*', REPLICATED)."
    )


def _axes(name: str, logical: str | None, rules: Rules, mesh: Mesh) -> tuple[str, ...]:
    if logical is None:
        return ()
    if logical not in rules:
        raise ValueError(
            f"No rule for the logical axis {logical!r} of {name}: rules map {sorted(rules)}."
        )
    axes = rules[logical]
    axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
    unknown = sorted(set(axes) - set(mesh.axis_names))
    if unknown:
        raise ValueError(
            f"The rule for {logical!r} names {unknown}, the mesh has the axes {mesh.axis_names}."
        )
    return axes


def _check(
    name: str, shape: tuple[int, ...], axes: tuple[tuple[str, ...], ...], mesh: Mesh
) -> None:
    used = [axis for dim in axes for axis in dim]
    if len(used) != len(set(used)):
        raise ValueError(
            f"The rules divide two dimensions of {name} {shape} over one axis: {axes}."
        )
    for dim, (size, over) in enumerate(zip(shape, axes, strict=True)):
        ways = math.prod(mesh.shape[axis] for axis in over)
        if size % ways:
            raise ValueError(
                f"Dimension {dim} of {name} {shape} does not divide by {ways}, the size of mesh "
                f"axes {over}: map its logical axis to None or to a smaller axis."
            )
