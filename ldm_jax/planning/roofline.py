"""The time of a program that has no code yet, and so no cycles: a roofline over its instructions.

An instruction takes `START` cycles and as long as the unit that it keeps busy longest: the matrix unit with its
products, HBM with the bytes that come from there or go there, the vector unit, where there is no product to hide it,
with the elements that it loads and stores. What lies in fast memory is no traffic of HBM; of what is sliced or updated
in place the slice counts; transfers and collectives in the background are hidden, as in the compiler's own cycles. What
each unit reaches of what it could is one number for all chips, fitted to those: `benchmarks/roofline.py` shows both.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ldm_jax.parallel.chips import Chip
from ldm_jax.planning.aot import CYCLES, Computations, Line, arrays, bodies, executions, parse, root
from ldm_jax.planning.collectives import KINDS
from ldm_jax.planning.products import products

START = 1700.0  # cycles of an instruction that does nothing
PRODUCTS, HBM = 0.85, 0.8  # of the peak and of the rate that the table of chips has
ELEMENTS = 128.0  # a cycle of a core, loaded or stored, of whatever size

# What the compiler gives no cycles: names of what is there, work of the scalar unit and of others, the background.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "reshape", "while", "call"),
    *("custom-call", "dynamic-update-slice", "send", "recv", "after-all", *KINDS),
    *("partition-id", "replica-id", "optimization-barrier"),
}
# In a fusion: what it only hands on, which is mostly the buffers of a collective that it carries along.
_PASSED = {*KINDS, "custom-call", "parameter", "tuple"}
_BACKGROUND = ("-start", "-update", "-done")


class Work(NamedTuple):
    """What one execution of an instruction asks of a device."""

    flops: float  # of products, those of cells that padding leaves idle among them
    bytes: float  # from and to HBM
    elements: float  # loaded and stored, wherever they lie, if there is no product


class _Touched(NamedTuple):
    elements: float  # that are read or written of an array
    bytes: float  # the same, if it lies in HBM


def timed(text: str, row: Chip) -> str:
    """A program's text with a roofline's cycles beside its instructions, in place of the compiler's if it has them.

    Raises:
      ValueError: as `aot.executions`.
    """
    text = CYCLES.sub("", text)
    computations = parse(text)
    found: dict[str, str] = {}
    for name in {name for name, _ in executions(computations)}:
        lines = computations[name]
        shapes = {line.name: line.shape for line in lines}
        for line in lines:
            if _computes(line):
                number = cycles(work(computations, lines, shapes, line), row)
                found[line.text] = (
                    f'{line.text}, backend_config={{"estimated_cycles":"{number:.0f}"}}'
                )
    return "\n".join(found.get(line, line) for line in text.splitlines())


def cycles(asked: Work, row: Chip) -> float:
    """Of one execution of an instruction that asks for so much."""
    products = asked.flops / (PRODUCTS * row.peak) * row.clock
    hbm = asked.bytes / (HBM * row.bandwidth) * row.clock
    longest = max(products, hbm, asked.elements / (ELEMENTS * row.cores))
    return START + longest if longest else 0.0


def work(
    computations: Computations, lines: Sequence[Line], shapes: Mapping[str, str], line: Line
) -> Work:
    """What a line of `lines`, which give values of these `shapes`, asks for; a collective alone asks for nothing."""
    multiplied = list(products(computations, lines, line))
    inner = itertools.chain(*bodies(computations, line))
    if not multiplied and any(each.operation in KINDS for each in inner):
        return Work(0.0, 0.0, 0.0)
    read = (
        _touched(shapes[name], itertools.repeat(_taken(computations, (), line, name)))
        for name in set(line.operands)
    )
    touched = [*itertools.chain(*read), *_touched(line.shape, _written(computations, (), line))]
    return Work(
        math.fsum(each.flops / each.filled for each in multiplied),
        math.fsum(each.bytes for each in touched),
        0.0 if multiplied else math.fsum(each.elements for each in touched),
    )


def _computes(line: Line) -> bool:
    if line.operation in _FREE or line.operation.endswith(_BACKGROUND):
        return False
    return line.operation == "fusion" or "[]" not in line.shape  # scalars are another unit's


def _touched(shape: str, limits: Iterable[float]) -> Iterator[_Touched]:
    """Of each array of a shape no more elements than its limit."""
    for array, limit in zip(arrays(shape), limits, strict=False):
        elements = min(float(array.elements), limit)
        yield _Touched(elements, 0.0 if "S(" in array.layout else elements * array.bytes)


def _size(shape: str) -> float:
    return float(sum(array.elements for array in arrays(shape)))


def _taken(computations: Computations, lines: Sequence[Line], line: Line, name: str) -> float:
    """How many elements of the value `name` a line of `lines` reads: of what it slices the slice, else all (inf)."""
    if line.operation in ("slice", "dynamic-slice", "gather"):
        return _size(line.shape)
    if line.operation == "bitcast":
        return _read(computations, lines, line.name)
    if line.operation in _PASSED or (
        line.operation == "dynamic-update-slice" and line.operands[0] == name
    ):
        return 0.0
    if line.operation != "fusion":
        return math.inf
    inner = computations[line.called("calls")]
    numbers = [f" parameter({i})" for i, each in enumerate(line.operands) if each == name]
    given = (each for each in inner if any(number in each.text for number in numbers))
    return math.fsum(_read(computations, inner, each.name) for each in given)


def _read(computations: Computations, lines: Sequence[Line], name: str) -> float:
    """How many elements of the value `name` the lines read together."""
    readers = (line for line in lines if name in line.operands)
    return math.fsum(_taken(computations, lines, line, name) for line in readers)


def _written(computations: Computations, lines: Sequence[Line], line: Line) -> list[float]:
    """How many elements a line writes of each array that it gives: of one that it updates in place the update."""
    named = {each.name: each for each in lines}
    if line.operation == "fusion":
        inner = computations[line.called("calls")]
        return _written(computations, inner, root(inner))
    if line.operation == "get-tuple-element" and named[line.operands[0]].operation in _PASSED:
        return [0.0]
    if line.operation in _PASSED - {"tuple"}:
        return [0.0] * len(arrays(line.shape))
    if line.operation in ("tuple", "bitcast"):
        parts = (named[name] for name in line.operands)
        return [size for part in parts for size in _written(computations, lines, part)]
    if line.operation == "dynamic-update-slice":
        return [_size(named[line.operands[1]].shape)]
    return [float(array.elements) for array in arrays(line.shape)]
