import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from ldm_jax.parallel import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    peak_flops,
    put_batch,
    put_same,
)
from ldm_jax.parallel.mesh import share_of


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
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": 3}, "data=-1, fsdp=3, tensor=1 does not fill 8 devices"),
        ({"data": 4, "fsdp": 1}, "does not fill 8 devices"),
        ({"data": 16, "fsdp": 1}, "does not fill 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one of them is -1"),
        ({"data": 0}, "positive"),
        ({"data": -2}, "positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_reason(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**sizes))


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


@pytest.mark.parametrize(
    ("owners", "shares"),
    [
        ([[0], [0], [1], [1]], {0: (0, 2), 1: (1, 2)}),
        ([[0, 0], [1, 1]], {0: (0, 2), 1: (1, 2)}),
        ([[0, 0, 1, 1]], {0: (0, 1), 1: (0, 1)}),  # tensor goes over both: each has all rows
        ([[0, 1], [0, 1], [2, 3], [2, 3]], {0: (0, 2), 1: (0, 2), 3: (1, 2)}),
        ([[1], [0]], {0: (1, 2), 1: (0, 2)}),  # parts follow the rows
    ],
)
def test_processes_give_the_rows_that_their_devices_hold(owners, shares):
    assert {process: share_of(process, np.array(owners)) for process in shares} == shares


@pytest.mark.parametrize("owners", [[[0, 0, 0], [0, 1, 1]], [[0], [0], [1]]])
def test_rows_that_processes_share_unequally_are_refused(owners):
    with pytest.raises(ValueError, match="make tensor a divisor or a"):
        share_of(0, np.array(owners))


def test_arrays_that_all_processes_have_are_divided_like_a_batch():
    mesh, rows = make_mesh(MeshConfig(data=2, fsdp=4)), np.arange(16.0).reshape(8, 2)
    placed = put_same(rows, mesh)
    assert placed.sharding.is_equivalent_to(batch_sharding(mesh), 2)
    np.testing.assert_array_equal(placed, rows)
    with pytest.raises(ValueError, match=r"batch of 6 .* multiple of 8"):
        put_same(rows[:6], mesh)


def test_slices_are_laid_along_data():
    topologies = pytest.importorskip("jax.experimental.topologies")
    pytest.importorskip("libtpu")
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu", num_slices=2).devices
    mesh = make_mesh(MeshConfig(data=-1, fsdp=4), devices)
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match=r"mesh.data is 1 on 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=-1), devices)
