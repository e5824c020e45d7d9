"""What a program is traced for: the devices of the mesh in force (`jax.set_mesh`), or without one all there are."""

import jax


def platform() -> str:
    """ "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def num_devices() -> int:
    """How many share its arrays."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() if mesh.empty else mesh.size
