import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from ldm_jax.parallel import MeshConfig, batch_sharding, make_mesh, peak_flops, put_batch


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1), (2, 4, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=1, tensor=8), (1, 1, 8)),
    ],
)
def test_minus_one_takes_the_devices_that_the_others_leave(config, sizes):
    mesh = make_mesh(config)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))


def test_axes_are_of_type_auto():
    assert set(make_mesh(MeshConfig()).axis_types) == {AxisType.Auto}


def test_given_devices_are_used_and_no_others():
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[4:])
    assert set(mesh.devices.flat) == set(jax.devices()[4:])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=-1, fsdp=3), "data=-1, fsdp=3, tensor=1 does not fill 8 devices"),
        (MeshConfig(data=4, fsdp=1), "does not fill 8 devices"),
        (MeshConfig(data=16, fsdp=1), "does not fill 8 devices"),
        (MeshConfig(data=-1, fsdp=-1), "at most one of them is -1"),
        (MeshConfig(data=0), "positive"),
        (MeshConfig(data=-2), "positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


def test_rows_of_a_batch_are_divided_over_data_and_fsdp_and_repeated_over_tensor():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = np.arange(24.0).reshape(8, 3)
    batch = put_batch({"x": rows, "index": np.arange(8)}, mesh)
    assert all(x.sharding.is_equivalent_to(batch_sharding(mesh), x.ndim) for x in batch.values())
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(batch["x"], rows)


def test_batch_that_does_not_divide_is_refused_with_the_number_it_must_divide_by():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    with pytest.raises(ValueError, match=r"batch of 12 .* multiple of 8"):
        put_batch({"x": np.zeros((12, 2))}, mesh)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_peak_is_the_vendors_where_it_is_known(kind, peak):
    assert peak_flops(kind) == peak
