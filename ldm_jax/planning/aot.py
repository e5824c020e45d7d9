"""Programs compiled for TPUs that are not here, and the time that the compiler expects of them.

libtpu's compiler needs no TPU: `topology("v5p:2x2x1")` gives devices to shard shapes over, `jax.jit(f).lower(...)` with
such shapes compiles for them, and the text of what it made (`compiled.as_text()`) says what it costs: cycles beside
every instruction but kernels and collectives. Kernels are counted here, collectives in `parallel.collectives`.
"""

import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from ldm_jax.parallel.chips import Chip

REACHED = 0.4  # of a chip's peak, by attention kernels
# Products of matrices in a kernel; the backward one repeats the forward one's first.
_PRODUCTS = {"fwd": 2, "dkv": 5}

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")


class Line(NamedTuple):
    """A line of the scheduled program."""

    name: str
    shape: str  # of what it gives: "bf16[8,128]{1,0:T(8,128)(2,1)}", or a tuple of such
    operation: str  # "fusion", "custom-call", ...
    operands: tuple[str, ...]  # names of lines in the same computation
    text: str

    @property
    def cycles(self) -> int:
        """Of one execution, without what it calls; 0 where the compiler does not know."""
        found = CYCLES.search(self.text)
        return int(found[1]) if found else 0

    @property
    def scope(self) -> str:
        """Where in the source it comes from: "jit(step)/jvp(UNet)/..."."""
        found = _SCOPE.search(self.text)
        return found[1] if found else ""

    @property
    def frame(self) -> int:
        """The row of the program's table of stack frames that it comes from; 0 where there is none."""
        found = _FRAME.search(self.text)
        return int(found[1]) if found else 0

    def called(self, key: str) -> str:
        """The name of the computation that it runs as its `key`: "body", "calls", ..."""
        found = re.search(rf"\b{key}=%([\w.\-]+)", self.text)
        return found[1] if found else ""


class Array(NamedTuple):
    """An array in a line's shape."""

    dtype: str
    elements: int
    bytes: float  # of an element
    layout: str  # "{1,0:T(8,128)S(1)}", where S says a memory that is not HBM


Computations = dict[str, list[Line]]  # by name; the one that a run begins with is ENTRY


class Instruction(NamedTuple):
    """A line that the compiler gives a cost, or that is a kernel of its own."""

    operation: str
    cycles: int  # of one execution
    times: int  # executions in a run of the program
    scope: str
    text: str


def topology(name: str, num_slices: int = 1) -> Sequence[jax.Device]:
    """The devices of slices such as "v5p:2x2x1", "v5e:16x16" or "v6e:8x16".

    Raises:
      ValueError: libtpu is not installed, or knows no such topology.
    """
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU to fight over either
    # As on machines with a v4, where both cores of a chip are one device.
    chip = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(
            name, platform="tpu", num_slices=num_slices, **chip
        ).devices
    except Exception as error:  # of many kinds
        raise ValueError(
            f"no compiler for the topology {name!r} ({error}); it needs jax[tpu], and is KIND:XxYxZ"
        ) from error


def parse(text: str) -> Computations:
    """The lines of every computation of `compiled.as_text()`, in the order of their execution."""
    found: Computations = {}
    lines: list[Line] = []
    for row in text.splitlines():
        if start := _COMPUTATION.match(row):
            found["ENTRY" if start[1] else start[2]] = lines = []
        elif line := _LINE.match(row):
            name, shape, operation, rest = line.groups()
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            lines.append(Line(name, shape, operation, tuple(operands), row))
        elif row == "}":
            lines = []
        elif lines:  # attributes of kernels run over several rows
            lines[-1] = lines[-1]._replace(text=f"{lines[-1].text}\n{row}")
    return found


def modules(text: str) -> dict[int, tuple[str, ...]]:
    """The modules, outermost first, in whose `__call__` each row of the program's table of stack frames lies.

    Of a row outside all modules, the function alone.
    """
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] = {}
    for row in text[: text.find("\n%")].splitlines():
        if re.fullmatch(r"[A-Z]\w+", row):
            tables[row] = table = {}
        elif found := re.match(r"(\d+) (.*)", row):
            table[int(found[1])] = found[2]

    def number(name: str, row: int, key: str) -> int:
        return int(re.findall(rf"{key}=(\d+)", tables[name][row])[0])

    def functions(frame: int) -> tuple[str, ...]:
        above = number("StackFrames", frame, "parent_frame_id") - 1  # 0 is none
        place = number("StackFrames", frame, "file_location_id")
        name = tables["FunctionNames"][number("FileLocations", place, "function_name_id")]
        return (*(functions(above) if above else ()), name.strip('"'))

    found = {}
    for frame in tables.get("StackFrames", ()):
        names = functions(frame)
        inside = (n.removesuffix(".__call__") for n in names if n.endswith(".__call__"))
        # A class that calls the one it is derived from comes twice, and counts once.
        found[frame] = tuple(n for n, _ in itertools.groupby(inside)) or (names[-1].split(".")[0],)
    return found


def executions(
    computations: Computations, name: str = "ENTRY", times: int = 1
) -> Iterator[tuple[str, int]]:
    """The computations that a run executes, and how often each: the entry, bodies of loops, what is called.

    Raises:
      ValueError: a loop has no known number of trips, or there is a conditional.
    """
    yield name, times
    for line in computations[name]:
        inner, trips = repeated(computations, name, line)
        if inner:
            yield from executions(computations, inner, times * trips)


def repeated(computations: Computations, name: str, line: Line) -> tuple[str, int]:
    """The computation that a loop or a call executes, and how often; ("", 0) for other lines of computation `name`.

    Raises:
      ValueError: as `executions`.
    """
    if line.operation == "while":
        return line.called("body"), _trips(computations, name, line)
    if line.operation == "call":
        return line.called("to_apply"), 1
    if line.operation == "conditional":
        raise ValueError(f"a program with a conditional has no one time: {line.scope}")
    return "", 0


def bodies(computations: Computations, line: Line) -> Iterator[list[Line]]:
    """The lines that a fusion or an asynchronous wrapper holds, and those of fusions in it."""
    if line.operation in ("fusion", "async-start"):
        lines = computations.get(line.called("calls"), [])
        yield lines
        for inner in lines:
            yield from bodies(computations, inner)


def instructions(text: str) -> Iterator[Instruction]:
    """What the program `compiled.as_text()` executes, loops counted by their trips.

    Raises:
      ValueError: as `executions`.
    """
    computations = parse(text)
    for name, times in executions(computations):
        for line in computations[name]:
            if line.operation == "custom-call" or CYCLES.search(line.text):
                yield Instruction(line.operation, line.cycles, times, line.scope, line.text)


def cycles(text: str) -> int:
    """The cycles that the compiler expects of a program, without those of kernels and collectives.

    XLA's own estimate counts the body of a loop once; here it counts as often as it runs.
    """
    return sum(line.cycles * line.times for line in instructions(text))


def seconds(line: Line | Instruction, chip: Chip) -> float:
    """One execution of a line: cycles by the clock, or of an attention kernel its products at `REACHED` of the peak."""
    return line.cycles / chip.clock + kernel_flops(line) / (REACHED * chip.peak)


def kernel_flops(line: Line | Instruction) -> float:
    """Floating-point operations of one run of a splash attention kernel (`nn.splash`); 0 for all other lines.

    Whole blocks are counted, and no mask.

    Raises:
      ValueError: it is a kernel of another kind.
    """
    if '"tpu_custom_call"' not in line.text:
        return 0.0
    found = re.search(rf"splash_mha_({'|'.join(_PRODUCTS)})", line.text)
    operands = line.text.partition("operand_layout_constraints=")[2]
    shapes = re.findall(r"(?:bf16|f32)\[(\d+(?:,\d+){3})\]", operands)
    if found is None or len(shapes) < 2:
        raise ValueError(f"a kernel of unknown cost: {line.scope or line.text.strip()[:200]}")
    (batch, heads, *q), (_, _, *k) = (map(int, shape.split(",")) for shape in shapes[:2])
    width, queries = sorted(q)  # either may lie innermost, and there are more tokens than channels
    return float(_PRODUCTS[found[1]] * 2 * math.prod((batch, heads, queries, max(k), width)))


def arrays(shape: str) -> list[Array]:
    """Those of a shape, which is of one array or of a tuple of such."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = re.search(r"\d+", dtype)  # none in "pred", which takes a byte
        size = int(bits[0]) / 8 if bits else 1.0
        found.append(Array(dtype, math.prod(integers(dims)), size, layout))
    return found


def integers(text: str | None) -> list[int]:
    """The numbers of "2,4"."""
    return [int(number) for number in (text or "").split(",") if number]


def _trips(computations: Computations, name: str, loop: Line) -> int:
    """How often a loop runs: as the compiler says, or as its counter's start, step and bound do."""
    if known := _TRIPS.search(loop.text):
        return int(known[1])
    try:
        start, step, end = _counter(computations, name, loop)
        return max(0, -((start - end) // step))
    except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        text = loop.text.strip()[:200]
        raise ValueError(f"a loop without a known number of trips: {text}") from error


def _counter(
    computations: Computations, name: str, loop: Line
) -> tuple[int | None, int | None, int | None]:
    """Start, step and end of what a loop counts upwards; None for what is no constant."""
    body, condition = (computations[loop.called(key)] for key in ("body", "condition"))
    test = root(condition)
    counter, bound = (_named(condition, operand) for operand in test.operands)
    index = int(re.findall(r"\bindex=(\d+)", counter.text)[0])
    start = _element(computations[name], loop.operands[0], index)
    step = _copied(body, _element(body, root(body).name, index))
    steps = [_integer(body, operand) for operand in step.operands]
    upwards = "direction=LT" in test.text and step.operation == "add"
    return (
        _integer(computations[name], start.name),
        next((number for number in steps if number is not None), None) if upwards else None,
        _integer(condition, bound.name),
    )


def root(lines: Sequence[Line]) -> Line:
    """The line of a computation whose value the computation gives."""
    return next((line for line in lines if line.text.lstrip().startswith("ROOT")), lines[-1])


def _named(lines: Sequence[Line], name: str) -> Line:
    return {line.name: line for line in lines}[name]


def _element(lines: Sequence[Line], name: str, index: int) -> Line:
    """The line that gives element `index` of a tuple."""
    return _named(lines, _named(lines, name).operands[index])


def _copied(lines: Sequence[Line], line: Line) -> Line:
    """What a line is a copy of; itself if it is none."""
    while line.operation in ("copy", "bitcast", "copy-start", "copy-done"):
        line = _named(lines, line.operands[0])
    return line


def _integer(lines: Sequence[Line], name: str) -> int | None:
    """The constant that a line is, or is a copy of."""
    found = re.search(r" constant\((-?\d+)\)", _copied(lines, _named(lines, name)).text)
    return int(found[1]) if found else None
