"""What devices send each other in a compiled program, and how long that takes: the compiler gives it no cost.

Bytes follow from ring arithmetic, seconds from the links that a group of devices has to itself. These are assumed:

- Chips form a torus. A dimension of the slice closes to a ring if it is as long as the pod (16 on v5e and v6e), or, in
  three dimensions, if all are multiples of 4; others are lines.
- A group sends along all dimensions that it spans at once, over both directions of a ring and one of a line: 2 x 4
  chips of v5e have two links' worth. A group of every second chip of a line shares it with the group between.
- Between slices every device has its share of its host's network.
- Latency is left out, and so are collectives that hold each other up.

A collective in the background is hidden by what its computation computes between its start and its end; each second of
that hides a second on each of the two networks.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ldm_jax.parallel.chips import Chip, Device, chip, exchange_links, hops, links, slice_of
from ldm_jax.planning.aot import (
    Computations,
    Line,
    arrays,
    bodies,
    executions,
    integers,
    parse,
    repeated,
    seconds,
)

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_CHAIN = re.compile(r'channel_id=\d+|chain_id="\d+"')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}')
_TARGET = re.compile(r"_xla_megascale_target=(\{\{[\d,{}>\-]*\}\})")
_LISTED = re.compile(r"replica_groups=\{([\d,{}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[((?:'\w+'=\d+,?)+)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{([\d,{}]*)\}")


class Collective(NamedTuple):
    """One collective; bytes and seconds are of one of its executions."""

    kind: str  # of KINDS
    bytes: int  # of the array: gathered, reduced, or a device's part of what is exchanged
    dtype: str
    group: int  # devices that take part together
    slices: int  # over which such a group spreads
    times: int  # executions in a run of the program
    ici_bytes: float  # that a device sends within its slice
    dcn_bytes: float  # and to other slices
    ici_seconds: float
    dcn_seconds: float
    exposed: float  # seconds that no computation hides
    sliced: int  # of an all-reduce, bytes of which each device uses a slice only
    elements: tuple[int, ...]  # of each array in the program's line
    scope: str  # where in the source it comes from
    frame: int  # and its row in the program's table of stack frames


class _Found(NamedTuple):
    line: Line  # that says who takes part: in a fusion the one inside
    outer: Line  # the fusion
    kind: str
    shape: str
    start: int  # among the lines of the computation
    done: int  # the same for one that is not in the background
    sliced: int = 0


def collectives(text: str, devices: Sequence[Device]) -> list[Collective]:
    """The collectives that `compiled.as_text()` executes on `devices`, in the order of the program.

    `devices` are in the order of the program's mesh (`mesh.devices.flat`). For several slices the compiler writes the
    program of one; its transfers over the data-centre network are collectives of their own.

    Raises:
      ValueError: there are not as many devices as the program is for, a device is not in the table of chips, groups are
        written in an unknown way, or a loop has no known number of trips.
    """
    computations, row = parse(text), chip(devices[0].device_kind)
    here = _partitions(text, devices)
    starts = {
        _chain(line)
        for lines in computations.values()
        if _has(lines, "AsyncCollectiveStart")
        for line in lines
        if line.operation in KINDS
    }
    result = []
    for name, times in executions(computations):
        lines = computations[name]
        found = list(_find(computations, lines, starts))
        sent = [_sent(each, _groups(each.line, here, devices), here, row) for each in found]
        work = [_work(computations, name, line, row) for line in lines] if found else []
        for each, left in zip(sent, _exposed(found, sent, work), strict=True):
            result.append(each._replace(times=times, exposed=left))
    return result


def _partitions(text: str, devices: Sequence[Device]) -> list[Device]:
    """The devices that the program's numbers count: all, or those of the first slice."""
    found = re.search(r"num_partitions=(\d+)", text)
    number = int(found[1]) if found else 1
    if number == len(devices):
        return list(devices)
    first = [device for device in devices if slice_of(device) == slice_of(devices[0])]
    if number != len(first):
        raise ValueError(f"a program of {number} partitions is given {len(devices)} devices")
    return first


# ---- finding them ----


def _find(
    computations: Computations, lines: Sequence[Line], starts: set[tuple[str, ...]]
) -> Iterator[_Found]:
    for i, line in enumerate(lines):
        if line.operation == "send" and (transfer := _TRANSFER.search(line.text)):
            kind = transfer[1].lower().replace("_", "-")
            kind = kind if kind in KINDS else "collective-permute"
            yield _Found(line, line, kind, line.shape.split("}")[0], i, _received(lines, i))
        elif line.operation.removesuffix("-start") in KINDS:
            done = _done(lines, i) if line.operation.endswith("-start") else i
            kind = line.operation.removesuffix("-start")
            result = lines[done] if lines[done].operation.endswith("-done") else line
            sliced = _sliced(computations, lines, result) if kind == "all-reduce" else 0
            yield _Found(line, line, kind, result.shape, i, done, sliced)
        elif line.operation in ("fusion", "async-start"):
            yield from _inside(computations, lines, i, starts)


def _inside(
    computations: Computations, lines: Sequence[Line], i: int, starts: set[tuple[str, ...]]
) -> Iterator[_Found]:
    """Collectives in a fusion or in an asynchronous wrapper.

    A fusion can begin a collective, end one that is under way, or carry one along while it computes. The first counts.
    """
    inner = [line for body in bodies(computations, lines[i]) for line in body]
    begins = _has(inner, "AsyncCollectiveStart")
    for line in inner:
        if line.operation not in KINDS or (_chain(line) in starts and not begins):
            continue
        kind, done = line.operation, i
        if begins:
            done = _ended(computations, lines, i, _chain(line))
        elif lines[i].operation == "async-start":
            done = _done(lines, i)
        elif kind == "all-reduce" and _bytes(lines[i].shape) < _bytes(line.shape):
            kind = "reduce-scatter"  # of which the fusion keeps a part
        yield _Found(line, lines[i], kind, line.shape, i, done)


def _has(lines: Sequence[Line], target: str) -> bool:
    return any(f'custom_call_target="{target}"' in line.text for line in lines)


def _chain(line: Line) -> tuple[str, ...]:
    """What the beginning, the end and what is between them of one collective have in common."""
    return line.operation, *_CHAIN.findall(line.text)


def _done(lines: Sequence[Line], i: int) -> int:
    """Where what line i starts is done; the end of the computation if that is elsewhere."""
    names = {lines[i].name}
    for j in range(i + 1, len(lines)):
        if names.intersection(lines[j].operands):
            if lines[j].operation.endswith("-done"):
                return j
            if lines[j].operation.endswith("-update"):
                names.add(lines[j].name)
    return len(lines) - 1


def _ended(
    computations: Computations, lines: Sequence[Line], i: int, chain: tuple[str, ...]
) -> int:
    for j in range(i + 1, len(lines)):
        inner = [line for body in bodies(computations, lines[j]) for line in body]
        if _has(inner, "AsyncCollectiveDone") and any(
            line.operation in KINDS and _chain(line) == chain for line in inner
        ):
            return j
    return len(lines) - 1


def _received(lines: Sequence[Line], i: int) -> int:
    """Where what other slices send for the transfer of line i is there."""
    meeting = _RENDEZVOUS.search(lines[i].text)
    for j, line in enumerate(lines):
        if line.operation == "recv" and meeting and f'"{meeting[1]}"' in line.text:
            return _done(lines, j)
    return _done(lines, i)


def _sliced(computations: Computations, lines: Sequence[Line], line: Line) -> int:
    """Bytes of what a line gives, or of the elements of the tuple, of which all readers take a slice."""
    readers = [each for each in lines if line.name in each.operands]
    parts = [each for each in readers if each.operation == "get-tuple-element"] or [line]
    return sum(_bytes(part.shape) for part in parts if _only_sliced(computations, lines, part.name))


def _only_sliced(computations: Computations, lines: Sequence[Line], name: str) -> bool:
    readers = [line for line in lines if name in line.operands]
    return bool(readers) and all(_slices(computations, lines, line, name) for line in readers)


def _slices(computations: Computations, lines: Sequence[Line], line: Line, name: str) -> bool:
    if line.operation in ("bitcast", "get-tuple-element", "copy", "convert"):
        return _only_sliced(computations, lines, line.name)
    if line.operation != "fusion":
        return line.operation in ("dynamic-slice", "slice")
    inner = next(bodies(computations, line))
    number = f" parameter({line.operands.index(name)})"
    return any(
        number in each.text and _only_sliced(computations, inner, each.name) for each in inner
    )


# ---- who takes part ----


def _groups(line: Line, here: Sequence[Device], everywhere: Sequence[Device]) -> list[list[Device]]:
    """The devices of each group; of a permutation, the pairs of source and target."""
    text = line.text
    if line.operation == "send":
        return _targets(text, everywhere)
    if pairs := _PAIRS.search(text):
        numbers = _rows(pairs[1])
    elif listed := _LISTED.search(text):
        numbers = _rows(listed[1]) or [list(range(len(here)))]
    elif iota := _IOTA.search(text):
        numbers = _iota(*(integers(part) for part in iota.groups())).tolist()
    elif mesh := _MESH.search(text):
        dims, order = integers(mesh[2]), integers(mesh[3])
        laid = _iota([-1], dims, order) if dims else None
        numbers = _mesh_groups(mesh[1], mesh[4], laid).tolist()
    else:
        raise ValueError(f"groups of devices in an unknown notation: {text.strip()[:300]}")
    return [[here[i] for i in row] for row in numbers]


def _targets(text: str, devices: Sequence[Device]) -> list[list[Device]]:
    """Who exchanges over the data-centre network: devices by their ids, or the slices (from 1 on) as a whole."""
    if whole := _SLICES.search(text):
        rows = [integers(whole[1])]
        named = {slice_of(device) + 1: device for device in reversed(devices)}
    else:
        listed = _TARGET.search(text)
        rows = _rows(listed[1].replace("->", ",")) if listed else [[]]
        named = {device.id: device for device in devices}
    if not all(row and named.keys() >= set(row) for row in rows):
        raise ValueError(f"a transfer between unknown devices: {text.strip()[:300]}")
    return [[named[number] for number in row] for row in rows]


def _rows(text: str) -> list[list[int]]:
    return [integers(row) for row in re.findall(r"\{?([\d,]*\d)\}", text)]


def _iota(shape: list[int], dims: list[int], order: list[int]) -> np.ndarray:
    """[2,4]<=[4,2]T(1,0): the numbers 0 to 7 as 4 x 2, transposed, as two groups of four."""
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return numbers.transpose(order or None).reshape(shape)


def _mesh_groups(axes: str, divided: str, laid: np.ndarray | None = None) -> np.ndarray:
    """mesh['a'=4,'b'=4] {'b'}: the numbers 0 to 15, or those that are `laid` there, as 4 x 4, a row a group.

    {'b':(2)2} is a part of b: the factor of 2 that follows one of 2.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    used = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", divided)
    }
    dims, grouped = [], []
    for name, size in sizes.items():
        before, taken = used.get(name, (1, 1))
        dims += [before, taken, size // before // taken]
        grouped.append(len(dims) - 2)
    others = [i for i in range(len(dims)) if i not in grouped]
    laid = np.arange(math.prod(dims)) if laid is None else laid
    numbers = laid.reshape(dims).transpose(others + grouped)
    return numbers.reshape(-1, math.prod(dims[i] for i in grouped))


# ---- bytes and seconds ----


def _sent(
    found: _Found, groups: Sequence[Sequence[Device]], here: Sequence[Device], row: Chip
) -> Collective:
    """One execution, wholly exposed: in the group that takes longest."""
    size, parts = _bytes(found.shape), arrays(found.shape)
    if found.line.operation.startswith("reduce-scatter") or (
        found.line.operation == "send" and found.kind == "all-gather"
    ):
        size *= len(groups[0])  # the line shows a device's part
    ends = [max(axis) + 1 for axis in zip(*(device.coords for device in here), strict=True)]
    costs = [_cost(found.kind, size, members, ends, row) for members in groups]
    slices, *numbers = max(costs, key=lambda cost: sum(cost[-2:]))
    source = found.line if found.line.scope else found.outer
    return Collective(
        *(found.kind, size, parts[0].dtype if parts else "", len(groups[0]), int(slices), 1),
        *(*numbers, sum(numbers[-2:]), found.sliced),
        *(tuple(part.elements for part in parts), source.scope, source.frame),
    )


def _cost(
    kind: str, size: int, members: Sequence[Device], ends: Sequence[int], row: Chip
) -> tuple[int, float, float, float, float]:
    """Slices, bytes that a device of a group sends over ICI and over DCN, and the seconds of each.

    Over several slices: within a slice, then each device its part with its like in the other slices, then within again.
    """
    slices = len({slice_of(device) for device in members})
    inside = [device for device in members if slice_of(device) == slice_of(members[0])]
    network = row.network / (row.chips * row.devices)
    if kind == "collective-permute":
        if slices > 1:
            return slices, 0.0, float(size), 0.0, size / network
        shared = hops(members[0], members[-1], ends, row)
        return 1, float(size), 0.0, size * shared / row.link, 0.0
    within, between = 1 - 1 / len(inside), 1 - 1 / slices
    if kind == "all-to-all":
        ici, dcn = size * within / slices, size * between
        ways = exchange_links(inside, ends, row)
    else:
        twice = 2 if kind == "all-reduce" else 1
        ici, dcn = twice * size * within, twice * size / len(inside) * between
        ways = links(inside, ends, row)
    return slices, ici, dcn, ici / (ways * row.link), dcn / network


def _bytes(shape: str) -> int:
    """Of an array, or of all arrays of a tuple."""
    return sum(int(each.elements * each.bytes) for each in arrays(shape))


# ---- what computation hides ----


def _work(computations: Computations, name: str, line: Line, row: Chip) -> float:
    """The seconds that a line of computation `name` computes, a loop with all its trips."""
    inner, trips = repeated(computations, name, line)
    nested = sum(_work(computations, inner, each, row) for each in computations.get(inner, ()))
    return seconds(line, row) + trips * nested


def _exposed(
    found: Sequence[_Found], sent: Sequence[Collective], work: Sequence[float]
) -> list[float]:
    """Each collective's seconds less what is computed meanwhile and hides no other on the same network."""
    left = [each.exposed for each in sent]
    budgets = {network: list(work) for network in ("ici", "dcn")}
    for i in sorted(range(len(found)), key=lambda i: found[i].done):
        budget = budgets["dcn" if sent[i].dcn_seconds else "ici"]
        for j in range(found[i].start + 1, found[i].done):
            hidden = min(left[i], budget[j])
            left[i] -= hidden
            budget[j] -= hidden
    return left
