"""The table of chips against the compiler for them, and the links of groups against counting who sends over which."""

import json
from itertools import product
from types import SimpleNamespace

import pytest
from aside import printed

from ldm_jax.parallel.chips import CHIPS, chip, exchange_links, hops, links, peak_flops

ROWS = {row.name: row for row in CHIPS}


def devices(*ends, devices_a_chip=1):
    """Of a slice of this size, first coordinate fastest as libtpu orders them."""
    places = product(*(range(end) for end in reversed(ends)), range(devices_a_chip))
    return [SimpleNamespace(coords=place[-2::-1], core=place[-1]) for place in places]


def line(length):
    return devices(length, 1, 1)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
    ],
)
def test_a_device_is_known_by_how_its_kind_begins(kind, name):
    assert chip(kind).name == name
    assert peak_flops(kind) == chip(kind).peak


def test_other_devices_have_a_peak_but_no_row():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("TPU v3") == 61.5e12
    assert peak_flops("cpu") is None
    with pytest.raises(ValueError, match=r"no row of `parallel\.chips` for the device"):
        chip("cpu")


def test_a_whole_pod_reduces_as_fast_as_the_vendor_states():
    """All-reduce bandwidth of a pod: 51.2 TB/s on v5e, 102.4 on v6e, 1.1 PB/s on v4."""
    for name, ends, stated in [
        ("v5e", (16, 16, 1), 51.2e12),
        ("v6e", (16, 16, 1), 102.4e12),
        ("v4", (16, 16, 16), 1.1e15),
    ]:
        pod, row = devices(*ends), ROWS[name]
        assert len(pod) * links(pod, ends, row) * row.link == pytest.approx(stated, rel=0.01)


@pytest.mark.parametrize(
    ("name", "ends", "members", "expected"),
    [
        ("v5e", (16, 16, 1), lambda device: device.coords[1] == 3, 2),  # a ring
        ("v5e", (8, 16, 1), lambda device: device.coords[1] == 3, 1),  # no pod's length
        ("v5e", (2, 4, 1), lambda device: True, 2),  # two lines
        ("v5e", (16, 16, 1), lambda device: device.coords[1] == 3 and device.coords[0] < 4, 1),
        ("v5p", (2, 2, 4), lambda device: True, 3),
        ("v5p", (4, 4, 8), lambda device: True, 6),
        ("v5p", (4, 4, 8), lambda device: device.coords[:2] == (0, 0), 2),
        ("v5e", (4, 1, 1), lambda device: device.coords[0] % 2 == 0, 2 / 3),
    ],
)
def test_a_group_has_the_links_of_the_dimensions_that_it_spans(name, ends, members, expected):
    group = [device for device in devices(*ends) if members(device)]
    assert links(group, ends, ROWS[name]) == pytest.approx(expected)


def test_two_devices_of_a_chip_share_its_links_unless_they_are_in_one_group():
    ends, row = (4, 4, 4), ROWS["tpu7x"]
    whole = devices(*ends, devices_a_chip=2)
    assert links(whole, ends, row) == 6
    assert links([device for device in whole if device.core == 0], ends, row) == 3
    assert links(whole[:2], ends, row) >= 6  # they need none


@pytest.mark.parametrize("length", [2, 4, 8, 16])
def test_an_exchange_loads_the_fullest_link_as_counting_says(length):
    """Everyone sends everyone a part of 1 / length, the shorter way round, half each way if both are as long."""
    closed = length == 16
    loads = dict.fromkeys(product(range(length), (1, -1)), 0.0)
    for source, target in product(range(length), repeat=2):
        far = (target - source) % length if closed else target - source
        ways = [far, far - length] if closed else [far]
        shortest = min(map(abs, ways))
        for way in (taken := [way for way in ways if abs(way) == shortest]):
            sign = 1 if way > 0 else -1
            for step in range(abs(way)):
                loads[(source + sign * step) % length, sign] += 1 / length / len(taken)
    sent = 1 - 1 / length
    assert sent / exchange_links(line(length), (length, 1, 1), ROWS["v5e"]) == pytest.approx(
        max(loads.values())
    )


def test_a_shift_takes_the_shorter_way_round_a_ring():
    ring, row = line(16), ROWS["v5e"]
    assert hops(ring[0], ring[15], (16, 1, 1), row) == 1
    assert hops(ring[0], ring[9], (16, 1, 1), row) == 7
    assert hops(ring[0], ring[7], (8, 1, 1), row) == 7
    both = devices(2, 2, 1, devices_a_chip=2)
    assert hops(both[0], both[1], (2, 2, 1), ROWS["tpu7x"]) < 1


COMPILED = """
import json
import jax, jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ldm_jax.planning.aot import cycles, topology
from ldm_jax.parallel.chips import chip
from ldm_jax.planning.cost import OutOfMemory

for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"):
    device = topology(name)[0]
    whole = NamedSharding(Mesh(np.array([device]), "x"), PartitionSpec())
    matrix = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=whole)
    text = jax.jit(jnp.matmul).lower(matrix, matrix).compile().as_text()
    try:
        vector = jax.ShapeDtypeStruct((2**38,), jnp.bfloat16, sharding=whole)
        jax.jit(jnp.negative).lower(vector).compile()
    except Exception as error:
        found = OutOfMemory.read(error)
    print(json.dumps([name, chip(device.device_kind).name, cycles(text), found.needed, found.available]))
"""


def test_peak_clock_and_memory_are_those_of_the_compiler():
    """A product of large matrices takes nearly the time of its operations at the peak, and never less."""
    rows = [json.loads(row) for row in printed(COMPILED)]
    assert len(rows) == len(CHIPS)
    for topology, name, cycles, needed, available in rows:
        row = ROWS[name]
        assert topology.startswith(name + ":")
        assert 0.75 < 2 * 4096**3 / row.peak / (cycles / row.clock) < 1
        assert needed == pytest.approx(2 * 2 * 2**38, rel=0.01)  # a vector and its negative
        assert available == pytest.approx(row.hbm, rel=1e-3)
