"""Meshes: how devices are laid out, and where a batch lies on them."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ldm_jax.parallel.rules import Rules
from ldm_jax.types import BATCH_AXES, TENSOR_AXIS

AXES = (*BATCH_AXES, TENSOR_AXIS)
SIZES = {"range": "-1 or [1, inf)"}  # of an axis


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes, and what they divide. One size may be -1: all the devices that the others leave.

    `data` repeats the parameters and divides the batch, `fsdp` divides both, `tensor` divides heads and feed-forward
    layers and repeats the batch. Over several slices of TPUs it is `data` that goes across them. `rules` name dims of
    parameters (`ldm_jax.models.axes`), each with the axis that divides it, the most important first.
    """

    # devices that divide the batch; -1: all that are left
    data: int = dataclasses.field(default=-1, metadata=SIZES)
    # devices that divide the parameters and the batch
    fsdp: int = dataclasses.field(default=1, metadata=SIZES)
    # devices that divide heads and feed-forward layers
    tensor: int = dataclasses.field(default=1, metadata=SIZES)
    rules: tuple[
        str, ...
    ] = (  # which axis divides which dim of a parameter, in order of preference
        "heads=tensor",
        "ffn=tensor",
        "in=fsdp",
        "embed=fsdp",
        "out=fsdp",
        "heads=fsdp",
        "ffn=fsdp",
    )

    def __post_init__(self) -> None:
        sizes = [getattr(self, axis) for axis in AXES]
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(
                f"Mesh sizes are positive and at most one of them is -1, got {_named(sizes)}."
            )
        for rule in self.rules:
            if rule.count("=") != 1:
                raise ValueError(
                    f"{rule!r} is no rule; it is the name of a dim and an axis, as in embed=fsdp"
                )

    @property
    def pairs(self) -> Rules:
        """The rules as `parallel.shardings` takes them."""
        return tuple(tuple(rule.split("=")) for rule in self.rules)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays `devices` (all of them by default) out in the axes data, fsdp, tensor.

    Neighbours on the mesh are neighbours on the torus of a slice, as far as it can be had; slices are laid along
    `data`. The axes are of type Auto: the compiler places what no sharding names.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or the slices do not divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    data, *rest = _sizes(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise ValueError(
            f"mesh.data is {data} on {slices} slices; it goes across them, so it must be a multiple of {slices}"
        )
    if slices == 1:
        grid = mesh_utils.create_device_mesh((data, *rest), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, *rest),
            (slices, *[1] * len(rest)),
            devices,
            allow_split_physical_axes=True,
        )
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    if jax.default_backend() == "cpu" and jax.process_count() > 1:
        _connect(mesh)
    return mesh


def _connect(mesh: Mesh) -> None:
    """Runs one collective over each set of axes, and over the processes, while all processes are at the same place.

    On CPUs Gloo connects a group of devices at its first collective, and gives up after 30 s that nothing can change:
    too few where one process compiles what another finds in its cache. Once connected, they wait for each other.
    """
    ones = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, PartitionSpec(AXES)), lambda index: np.ones(1, np.float32)
    )
    axes = [axis for axis in AXES if mesh.shape[axis] > 1]
    for number in range(1, len(axes) + 1):
        for some in itertools.combinations(axes, number):
            total = functools.partial(jax.lax.psum, axis_name=some)
            rest = PartitionSpec(tuple(axis for axis in AXES if axis not in some))
            jax.jit(jax.shard_map(total, mesh=mesh, in_specs=PartitionSpec(AXES), out_specs=rest))(
                ones
            ).block_until_ready()
    multihost_utils.process_allgather(np.ones(1))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis of a batch over data and fsdp, whatever axes follow it."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device, and so to be fetched by every process."""
    return NamedSharding(mesh, PartitionSpec())


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of each batch this process puts on its devices, and how many parts there are.

    Raises:
      ValueError: as `share_of`.
    """
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return share_of(jax.process_index(), owners.reshape(_ways(mesh), -1))


def share_of(process: int, owners: np.ndarray) -> tuple[int, int]:
    """Which part of a batch is a process's, and how many parts there are: `owners[i]` are the processes with row i.

    Processes whose devices hold the same rows, as where `tensor` goes over several of them, have the same part.

    Raises:
      ValueError: the rows of two processes overlap without being the same, or are not as many.
    """
    rows = {number: tuple(np.flatnonzero((owners == number).any(1))) for number in set(owners.flat)}
    parts = sorted(set(rows.values()))
    if sum(map(len, parts)) != len(owners) or len(set(map(len, parts))) > 1:
        raise ValueError(
            f"the mesh divides a batch among the processes {owners.tolist()} unequally; make tensor a divisor or a"
            " multiple of the devices of a process"
        )
    return parts.index(rows[process]), len(parts)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Moves a pytree of host arrays `[B, ...]` to the devices; every process gives the rows of its `batch_share`.

    Raises:
      ValueError: the rows of all processes do not divide over the devices that share a batch.
    """
    sharding, (_, parts) = batch_sharding(mesh), batch_share(mesh)

    def put(array: Any) -> jax.Array:
        check_rows(len(array) * parts, mesh)
        return jax.make_array_from_process_local_data(sharding, array)

    return jax.tree.map(put, batch)


def put_same(batch: Any, mesh: Mesh) -> Any:
    """As `put_batch`, of arrays that every process has whole."""
    sharding = batch_sharding(mesh)

    def put(array: Any) -> jax.Array:
        array = np.asarray(array)
        check_rows(len(array), mesh)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, batch)


def _ways(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_rows(size: int, mesh: Mesh) -> None:
    """Raises ValueError for a batch that does not divide over the devices that share it."""
    ways = _ways(mesh)
    if size % ways:
        raise ValueError(
            f"A batch of {size} does not divide over the {ways} devices that share it (mesh "
            f"{dict(mesh.shape)}): make the batch size a multiple of {ways}."
        )


def _named(sizes: Sequence[int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))


def _sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    sizes = tuple(getattr(config, axis) for axis in AXES)
    known = math.prod(size for size in sizes if size != -1)
    if num_devices % known or (known != num_devices and -1 not in sizes):
        raise ValueError(
            f"A mesh of {_named(sizes)} does not fill {num_devices} devices: the sizes must multiply to "
            f"{num_devices}, and one of them may be -1 to take what is left."
        )
    return tuple(num_devices // known if size == -1 else size for size in sizes)
