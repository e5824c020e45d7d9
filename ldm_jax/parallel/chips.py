"""What chips can do: a row a generation of TPU, the links that groups of chips have, the peaks of other devices."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

GIB = 2**30

Device = Any  # a jax.Device, of which `device_kind`, `id`, `coords` and `slice_index` are read


class Chip(NamedTuple):
    """A generation of TPU. Rates and memory are of one JAX device, links and network of what carries them.

    A JAX device is a chip, but half of one on TPU7x, where a chip is two devices.
    """

    name: str  # as topologies begin: "v5p:2x2x1"
    kinds: tuple[str, ...]  # how `jax.Device.device_kind` begins
    peak: float  # dense bf16 FLOP/s
    clock: float  # cycles/s, of which the compiler counts
    hbm: float  # bytes that programs may use
    bandwidth: float  # bytes/s between HBM and the device
    dims: int  # of the torus of chips; two links a dimension
    link: float  # bytes/s of one link in one direction
    network: float  # bytes/s of a host's data-centre network
    chips: int  # chips a host
    devices: int  # JAX devices a chip
    cores: int  # cores a JAX device


# Origins of the figures:
# - Peak, HBM's rate, links, network: Google's pages on v4, v5e, v5p, v6e and tpu7x below cloud.google.com/tpu/docs.
#   Links are stated for a chip and both directions (v5e 400 GB/s, v6e 800, v5p and 7x 1200): here a link's, one way.
#   v4's follows from 1.1 PB/s of all-reduce a pod: by 4096 chips and six links. The network is stated for a host of 8
#   chips (v5e 2 x 100 Gbit/s, v6e 4 x 200) or for a chip (v5p 50 Gbit/s, 7x 100); v4's is not, and is taken as v5p's.
# - Clock: the peak by the operations that the matrix units do in a cycle: 2 for each of 128 x 128 cells of eight units
#   (v4, v5p) or four (v5e), of 256 x 256 cells of four (v6e, 7x). In the compiler's cycles products of 4096 reach 81%
#   to 97% of that, and adding to a float32 array 73% to 81% of HBM's rate (v5e, v5p, v6e).
# - HBM: what the compiler says is available when it refuses a program.
# The longest name of a family stands first.
# fmt: off
CHIPS = (
    #     name     kinds                          peak       clock   hbm          rate      links    network  host
    Chip("v4",    ("TPU v4",),                    275e12,    1.05e9, 30.75 * GIB, 1.228e12, 3, 45e9,  25e9,  4, 1, 2),
    Chip("v5e",   ("TPU v5 lite", "TPU v5e"),     197e12,    1.50e9, 15.75 * GIB, 0.819e12, 2, 50e9,  25e9,  8, 1, 1),
    Chip("v5p",   ("TPU v5",),                    459e12,    1.75e9, 95.73 * GIB, 2.765e12, 3, 100e9, 25e9,  4, 1, 2),
    Chip("v6e",   ("TPU v6",),                    918e12,    1.75e9, 31.24 * GIB, 1.638e12, 2, 100e9, 100e9, 8, 1, 1),
    Chip("tpu7x", ("TPU7x",),                     1153.5e12, 2.20e9, 94.74 * GIB, 3.690e12, 3, 100e9, 50e9,  4, 2, 1),
)
# fmt: on

_DIE = 6.0  # links' worth that the two devices of a chip are taken to have between them

# A JAX device is one core of a TPU v2 and v3.
_OTHER_PEAKS = (
    ("TPU v2", 22.5e12),
    ("TPU v3", 61.5e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200", 989e12),
)


def chip(device_kind: str) -> Chip:
    """The row of a `jax.Device.device_kind`.

    Raises:
      ValueError: the table has no such chip.
    """
    for row in CHIPS:
        if device_kind.startswith(row.kinds):
            return row
    known = ", ".join(row.name for row in CHIPS)
    raise ValueError(f"no row of `parallel.chips` for the device {device_kind!r}; it has {known}")


def slice_named(topology: str) -> tuple[Chip, int]:
    """The row and the number of chips of a slice by its name, such as "v5e:16x16"; no compiler is asked.

    Raises:
      ValueError: it is no such name.
    """
    kind, _, dims = topology.partition(":")
    row = next((row for row in CHIPS if row.name == kind), None)
    if row is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dims):
        known = ", ".join(row.name for row in CHIPS)
        raise ValueError(
            f"no slice is called {topology!r}: it is KIND:AxB or KIND:AxBxC, of {known}"
        )
    return row, math.prod(map(int, dims.split("x")))


def peak_flops(device_kind: str) -> float | None:
    """The dense bf16 FLOP/s that the vendor states for a `jax.Device.device_kind`, if known."""
    peaks = [(kind, row.peak) for row in CHIPS for kind in row.kinds]
    return next(
        (peak for kind, peak in (*peaks, *_OTHER_PEAKS) if device_kind.startswith(kind)), None
    )


# `coords` are a chip's place in its slice; `ends` is the size of the slice in each dimension.


def slice_of(device: Device) -> int:
    """The number of a device's slice, from 0 on."""
    return getattr(device, "slice_index", 0) or 0


def links(members: Sequence[Device], ends: Sequence[int], row: Chip) -> float:
    """How many links, each in one direction, a device of a group has for rings through the group.

    A dimension that the group spans has two if it closes to a ring, else one. A group of every second chip of a line
    has about half of that, and so has a device whose chip's other device belongs to another group.
    """
    chips, spans = _box(members)
    if chips == 1:
        return _DIE
    spanned = zip(spans, ends, strict=True)
    ways = sum(_directions(span, end, ends, row) for span, end in spanned if span > 1)
    return ways * _share(members, row)


def exchange_links(members: Sequence[Device], ends: Sequence[int], row: Chip) -> float:
    """The same for an exchange of everyone with everyone.

    On average the parts go a quarter of the way round a ring; half of them pass the middle of a line.
    """
    chips, spans = _box(members)
    if chips == 1:
        return _DIE
    spanned = zip(spans, ends, strict=True)
    load = max(span / (4 * _directions(span, end, ends, row)) for span, end in spanned if span > 1)
    return (1 - 1 / len(members)) / load * _share(members, row)


def hops(source: Device, target: Device, ends: Sequence[int], row: Chip) -> float:
    """Over how many links a shift goes in its longest dimension: so many transfers share one if all go as far."""
    steps = []
    for a, b, end in zip(source.coords, target.coords, ends, strict=True):
        ring = _directions(end, end, ends, row) == 2
        steps.append(min(abs(a - b), end - abs(a - b)) if ring else abs(a - b))
    return float(max(steps) * row.devices) or 1 / _DIE


def _box(members: Sequence[Device]) -> tuple[int, list[int]]:
    """The chips of a group, and the sides of the smallest box around them."""
    chips = {tuple(device.coords) for device in members}
    return len(chips), [max(axis) - min(axis) + 1 for axis in zip(*chips, strict=True)]


def _directions(span: int, end: int, ends: Sequence[int], row: Chip) -> int:
    """Of a dimension: 2 if it closes and the group goes all round it, else 1."""
    closes = end == 16 if row.dims == 2 else all(size % 4 == 0 for size in ends)
    return 2 if closes and span == end else 1


def _share(members: Sequence[Device], row: Chip) -> float:
    """How many of the devices in its box belong to the group; the others use the box's links as well."""
    _, spans = _box(members)
    return len(members) / math.prod(spans) / row.devices
