"""What a program compiled for TPUs costs: its time, where that goes, its memory, and what it wastes.

Time is what one device computes, the compiler's cycles by the clock of the chip (where there is no code, those of
`parallel.roofline`), plus its attention kernels, plus what collectives leave uncovered. The compiler's cycles are an
estimate: it takes elementwise work on bfloat16 to be as slow as on float32, and transfers between HBM and fast memory
to be hidden.
"""

import collections
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from ldm_jax.parallel.chips import Device, chip
from ldm_jax.planning.aot import (
    Computations,
    Line,
    bodies,
    executions,
    kernel_flops,
    modules,
    parse,
    seconds,
)
from ldm_jax.planning.collectives import KINDS, Collective, collectives
from ldm_jax.planning.products import product_name, products
from ldm_jax.types import BATCH_AXES

WASTED = 0.25  # of the matrix unit's cells by padding: from there on `wasteful` warns
NOTICED = 0.01  # of the program's time: below that it does not
LARGE = 2**24  # bytes of a parameter that every device holds whole

_KERNEL, _COLLECTIVE = "attention kernel", "collective"
_ALONE = ("sort", "scatter", "gather", "rng-bit-generator", "fft", "custom-call")
_REDUCTIONS = {"reduce", "reduce-window", "select-and-scatter"}
_MOVES = {
    *("copy", "transpose", "reshape", "bitcast", "slice", "dynamic-slice", "dynamic-update-slice"),
    *("pad", "concatenate", "broadcast", "reverse", "convert", "parameter", "constant", "tuple"),
    *("get-tuple-element", "fusion", "iota", "copy-start", "slice-start"),
}
_NOWHERE = "(no scope)"
_CONTROL = {"while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", ""}


class Memory(NamedTuple):
    """Bytes of one device's memory."""

    arguments: int
    outputs: int  # without those that take the place of arguments
    temporaries: int  # as many as there are at one time
    code: int
    left: int  # of what programs may use


class Cost(NamedTuple):
    """One run of a program on every one of its devices; seconds and FLOPs are of one device."""

    seconds: float  # compute + kernels + exposed
    compute: float
    kernels: float
    kernel_flops: float
    ici: float  # seconds of collectives within a slice, hidden ones too
    dcn: float  # and between slices
    exposed: float  # of both, what no computation hides
    collectives: tuple[Collective, ...]
    memory: Memory


class Profile(NamedTuple):
    """Seconds of a program, divided in two ways; each sums to `Cost.seconds`."""

    modules: dict[str, float]  # by where in the source it comes from, the largest first
    kinds: dict[str, float]  # by kind of operation


class OutOfMemory(MemoryError):
    """The compiler found no room for a program: bytes `needed`, of which `available` are there."""

    def __init__(self, needed: int, available: int) -> None:
        self.needed, self.available = needed, available
        super().__init__(
            f"a program needs {needed / 2**30:.2f} GiB a device, which has {available / 2**30:.2f}"
        )

    @classmethod
    def read(cls, error: Exception) -> "OutOfMemory | None":
        """What the compiler's error RESOURCE_EXHAUSTED says; None for any other error."""
        text = str(error)
        sizes = r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
        used = r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"
        found = re.search(sizes, text) or re.search(used, text)
        if "RESOURCE_EXHAUSTED" not in text or found is None:
            return None
        needed, unit, available, unit_2 = found.groups()
        return cls(_bytes(needed, unit), _bytes(available, unit_2))


def cost(text: str, memory: Any, devices: Sequence[Device]) -> Cost:
    """The cost of a program: `compiled.as_text()`, `compiled.memory_analysis()`, and the devices of its mesh in order.

    Raises:
      OutOfMemory: the program and its code have not room together, though the compiler found room for the program.
      ValueError: as `collectives`, there is a kernel of unknown cost, or a number is negative or not finite.
    """
    sent = collectives(text, devices)
    items = _items(parse(text), sent, devices)
    parts = {_KERNEL: 0.0, _COLLECTIVE: 0.0, **_sums((item.kind, item.seconds) for item in items)}
    total = math.fsum(parts.values())
    result = Cost(
        total,
        math.fsum(parts[kind] for kind in parts if kind not in (_KERNEL, _COLLECTIVE)),
        parts[_KERNEL],
        math.fsum(item.flops for item in items),
        math.fsum(each.times * each.ici_seconds for each in sent),
        math.fsum(each.times * each.dcn_seconds for each in sent),
        parts[_COLLECTIVE],
        tuple(sent),
        memory_of(memory, chip(devices[0].device_kind).hbm),
    )
    _check(result)
    return result


def profile(text: str, devices: Sequence[Device], depth: int = 3) -> Profile:
    """Where a program's seconds go. `depth`: how many nested modules' names tell them apart.

    A module is the chain of classes whose `__call__` an instruction comes from, or where the program has no table of
    stack frames the names of its scope; its forward and backward pass count together. Raises ValueError as
    `collectives`, and for a kernel of unknown cost.
    """
    items = _items(parse(text), collectives(text, devices), devices)
    frames = modules(text)
    names = (frames.get(item.frame) or _named_scopes(item.scope) for item in items)
    return Profile(
        _sums(
            ("/".join(name[:depth]), item.seconds) for name, item in zip(names, items, strict=True)
        ),
        _sums((item.kind, item.seconds) for item in items),
    )


def wasteful(text: str, devices: Sequence[Device], arguments: Any = None) -> list[str]:
    """Warnings of layouts that waste the chips, a sentence each, with the share of the time that it concerns.

    Of matrix products and convolutions whose sizes leave more than `WASTED` of the matrix unit idle, and of sums over
    devices of which each keeps a slice. Given the program's `arguments` (a pytree of ShapeDtypeStruct with shardings)
    also of gathers of what is no argument, and of arguments of `LARGE` size that every device holds whole though an
    axis of their mesh could divide them; the first of `BATCH_AXES` is there to repeat them. Raises ValueError as
    `profile`.
    """
    sent = collectives(text, devices)
    computations = parse(text)
    total = math.fsum(item.seconds for item in _items(computations, sent, devices))
    found = [
        *_padded(computations, devices),
        *_unscattered(sent),
        *(_gathered(sent, arguments) if arguments is not None else ()),
    ]
    shares = {message: time / total for message, time in _sums(found).items()}
    warnings = [
        f"{message}, {share:.1%} of the time"
        for message, share in shares.items()
        if share > NOTICED
    ]
    return warnings + ([] if arguments is None else list(_whole(arguments)))


# ---- items: what a run spends its time on ----


class _Item(NamedTuple):
    kind: str
    scope: str
    frame: int  # of the program's table of stack frames
    seconds: float  # of all executions
    flops: float  # of kernels


def _items(
    computations: Computations, sent: Sequence[Collective], devices: Sequence[Device]
) -> list[_Item]:
    row = chip(devices[0].device_kind)
    items = []
    for name, times in executions(computations):
        for line in computations[name]:
            if time := times * seconds(line, row):
                inner = [line, *(each for body in bodies(computations, line) for each in body)]
                flops = times * kernel_flops(line)
                source = _source(inner)
                items.append(_Item(_kind(inner), source.scope, source.frame, time, flops))
    for each in sent:
        exposed = each.times * each.exposed
        items.append(_Item(_COLLECTIVE, each.scope, each.frame, exposed, 0.0))
    return items


def _kind(lines: Sequence[Line]) -> str:
    """Of an instruction and what it fuses: that which costs most when it is there."""
    if '"tpu_custom_call"' in lines[0].text:
        return _KERNEL
    operations = {line.operation for line in lines}
    for line in lines:
        if line.operation == "convolution":  # so TPUs compute products of matrices, too
            return product_name(line)
    for operation in ("dot", *_ALONE):
        if operation in operations:
            return operation
    if operations & _REDUCTIONS:
        return "reduction"
    if operations & set(KINDS):
        return _COLLECTIVE
    return "copy" if operations <= _MOVES else "elementwise"


def _source(lines: Sequence[Line]) -> Line:
    """The instruction, its products, or the last line that it fuses: whichever says first where it comes from."""
    ranked = [lines[0], *(line for line in lines if line.operation == "convolution"), *lines[::-1]]
    return next((line for line in ranked if line.scope), lines[0])


def _named_scopes(scope: str) -> tuple[str, ...]:
    """jit(step)/transpose(jvp(UNet))/down_0/while/body/attention/dot_general: UNet, down_0, attention."""
    names = re.sub(r"p?jit\([^()]*\)|\w+\(|\)", "", scope).split("/")[:-1]
    return tuple(name for name in names if name not in _CONTROL) or (_NOWHERE,)


def _sums(pairs: Any) -> dict[str, float]:
    """The exact sum of each name's numbers, the largest first."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for name, number in pairs:
        found[name].append(number)
    sums = {name: math.fsum(numbers) for name, numbers in found.items()}
    return dict(sorted(sums.items(), key=lambda pair: -pair[1]))


# ---- memory ----


def memory_of(memory: Any, hbm: float) -> Memory:
    """By what it is for: of `compiled.memory_analysis()`, on a device with `hbm` bytes. Raises OutOfMemory."""
    given, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    outputs -= memory.alias_size_in_bytes
    # At the peak: the compiler's size of temporaries counts fast memory and what is never there at the same time.
    temporaries = memory.peak_memory_in_bytes - given - outputs
    sizes = (given, outputs, temporaries, memory.generated_code_size_in_bytes)
    if min(sizes) >= 0 and sum(sizes) > hbm:
        raise OutOfMemory(sum(sizes), int(hbm))
    return Memory(*sizes, int(hbm) - sum(sizes))


def _check(result: Cost) -> None:
    numbers = {**result._asdict(), **result.memory._asdict()}
    for name, number in numbers.items():
        if isinstance(number, int | float) and not 0 <= number < math.inf:
            raise ValueError(f"the program's cost cannot be: {name} is {number}")


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 2 ** (10 * " KMGT".index(unit or " ")))


# ---- waste ----


def _padded(computations: Computations, devices: Sequence[Device]) -> Iterator[tuple[str, float]]:
    row = chip(devices[0].device_kind)
    for name, times in executions(computations):
        for line in computations[name]:
            time = times * seconds(line, row)
            for each in products(computations, computations[name], line) if time else ():
                if each.filled < 1 - WASTED:
                    sizes = "{0} x {1} by {1} x {2}".format(*each.sizes)
                    yield (
                        f"a {each.name} of {sizes} fills {each.filled:.0%} of the matrix unit",
                        time,
                    )


def _unscattered(sent: Sequence[Collective]) -> Iterator[tuple[str, float]]:
    for each in sent:
        if each.sliced:
            text = f"{each.sliced / 2**20:.1f} MiB are summed on every device of {each.group}"
            time = each.times * each.exposed * each.sliced / each.bytes
            yield f"{text} and then sliced, in {each.scope or _NOWHERE}", time


def _gathered(sent: Sequence[Collective], arguments: Any) -> Iterator[tuple[str, float]]:
    """Gathers of other sizes than an argument or a layer of one has, whole or divided by other axes."""
    known = {
        leaf.size // layers // ways
        for leaf in jax.tree.leaves(arguments)
        for layers in (1, *leaf.shape[:1])
        for ways in (1, *getattr(getattr(leaf.sharding, "mesh", None), "shape", {}).values())
    }
    for each in sent:
        # Between slices parts are gathered, which have other sizes.
        if each.kind == "all-gather" and each.slices == 1 and not known.issuperset(each.elements):
            text = f"{each.bytes / 2**20:.1f} MiB that are no argument are gathered on every device"
            yield f"{text} of {each.group}, in {each.scope or _NOWHERE}", each.times * each.exposed


def _whole(arguments: Any) -> Iterator[str]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        size, sharding = leaf.size * leaf.dtype.itemsize, leaf.sharding
        if size < LARGE or not isinstance(sharding, NamedSharding):
            continue
        axes = [
            axis
            for axis, ways in sharding.mesh.shape.items()
            if axis != BATCH_AXES[0] and ways > 1 and any(dim % ways == 0 for dim in leaf.shape)
        ]
        if axes and sharding.is_fully_replicated:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            yield f"{name} ({size / 2**20:.0f} MiB) is whole on every device, {axes} could divide it"
