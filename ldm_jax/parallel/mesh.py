"""Meshes: how devices are laid out, where a batch lies on them, what they can do at most."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ldm_jax.types import BATCH_AXES, HEAD_AXIS

AXES = (*BATCH_AXES, HEAD_AXIS)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes. One of them may be -1: all the devices that the others leave.

    `data` repeats the parameters and divides the batch, `fsdp` divides both, `tensor` divides
    single matrices and repeats the batch.
    """

    data: int = -1  # devices that divide the batch; -1: all that are left
    fsdp: int = 1  # devices that divide the parameters and the batch
    tensor: int = 1  # devices that divide single matrices


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays `devices` (all of them by default) out in the axes data, fsdp, tensor.

    The axes are of type Auto: the compiler places what no sharding names.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(config, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis of a batch over data and fsdp, whatever axes follow it."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Moves a pytree of host arrays `[B, ...]` to the devices; every process gives its own rows.

    Raises:
      ValueError: the rows of all processes do not divide over the devices that share a batch.
    """
    sharding = batch_sharding(mesh)
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    def put(array: Any) -> jax.Array:
        size = len(array) * jax.process_count()
        if size % ways:
            raise ValueError(
                f"A batch of {size} does not divide over the {ways} devices that share it (mesh "
                f"{dict(mesh.shape)}): make the batch size a multiple of {ways}."
            )
        return jax.make_array_from_process_local_data(sharding, array)

    return jax.tree.map(put, batch)


def peak_flops(device_kind: str) -> float | None:
    """The dense bf16 FLOP/s that the vendor states for a `jax.Device.device_kind`, if known."""
    return next((peak for kind, peak in _PEAKS if device_kind.startswith(kind)), None)


# A JAX device is one core of a TPU v2 and v3 and of the two-chiplet TPU7x, a whole chip elsewhere.
# The longest name of a family stands first.
_PEAKS = (
    ("TPU v2", 22.5e12),
    ("TPU v3", 61.5e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 1153.5e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200", 989e12),
)


def _sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    sizes = dataclasses.astuple(config)
    given = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"Mesh sizes are positive and at most one of them is -1, got {given}.")
    known = math.prod(size for size in sizes if size != -1)
    if num_devices % known or (known != num_devices and -1 not in sizes):
        raise ValueError(
            f"A mesh of {given} does not fill {num_devices} devices: the sizes must multiply to "
            f"{num_devices}, and one of them may be -1 to take what is left."
        )
    return tuple(num_devices // known if size == -1 else size for size in sizes)
