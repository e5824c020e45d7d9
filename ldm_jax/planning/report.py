"""Reports of `ldm_jax.plan`: the table of backbones, the plan of a run, the search for a layout."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from ldm_jax.models import BACKBONES
from ldm_jax.models.sizes import SIZES, UNITS
from ldm_jax.parallel.chips import Chip, chip
from ldm_jax.planning import layouts, programs
from ldm_jax.planning.aot import topology
from ldm_jax.planning.collectives import Collective
from ldm_jax.planning.cost import Memory, OutOfMemory
from ldm_jax.planning.scheduled import scheduled
from ldm_jax.runs.config import RunConfig
from ldm_jax.settings.command_line import UsageError
from ldm_jax.settings.values import flag

HEADER = ("backbone", "source", "M params", "printed", "", "forward", "", "printed", "", "")
ROW = "{:<22} {:<11} {:>9} {:>8} {:>7} {:>9} {:<6} {:>8} {:>7}  {}"
PLANNED = ("training", "sampling")
IMAGES = {"sampling": "sampling.batch", "encoding": "data.encode_batch"}
FOUND = 3  # layouts that `--search` compiles, if they fit
TRIED = 2  # times as many it compiles at most
SHOWN = 12  # modules in a profile
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Request:
    """The report that is wanted. Raises UsageError for a number below 1."""

    table: bool = flag(False, "print the backbones and their costs", action="store_true")
    topology: str | None = flag(
        None,
        "the slice: its kind and its chips, such as v5e:16x16, v5p:4x4x8, v6e:8x16",
        metavar="KIND:AxB",
    )
    slices: int = flag(
        1,
        "how many of them, joined by the data-centre network (default 1)",
        type=int,
        metavar="N",
    )
    price: float | None = flag(
        None, "of a chip for an hour, in whatever currency", type=float, metavar="AMOUNT"
    )
    program: str | None = flag(
        None,
        "one alone: training or sampling, or encoding, which makes the latents",
        choices=tuple(programs.PROGRAMS),
    )
    search: int | None = flag(
        None,
        "look for the fastest layout of the training step that fits, among the best N (default"
        f" {FOUND}) that do",
        type=int,
        nargs="?",
        const=FOUND,
        metavar="N",
    )
    memory: bool = flag(
        False,
        "what a chip holds and sends, and the time by a roofline: in minutes, where code takes the compiler hours",
        action="store_true",
    )
    profile: bool = flag(
        False, "where the time goes, by module and by kind of operation", action="store_true"
    )

    def __post_init__(self) -> None:
        for name in ("slices", "search"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise UsageError(f"--{name} is {number}; it is at least 1")


def report(config: RunConfig | None, request: Request) -> Iterator[str]:
    """Yields the lines of the table, of the plan, or of the layouts found; JAX is then for the CPU alone.

    Raises UsageError where there is no config or no slice to plan for.
    """
    if request.table:
        yield from table()
        return
    if config is None or request.topology is None:
        raise UsageError(
            "a plan takes --config=FILE and --topology=KIND:AxB; --table prints the backbones and their costs"
        )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot hold programs for TPUs
    devices = topology(request.topology, request.slices)
    yield from (search if request.search else plan)(config, request, devices)


def plan(config: RunConfig, request: Request, devices: Sequence[Any]) -> Iterator[str]:
    """Reports on the run as its config has it."""
    run = programs.Planned(config, devices=devices)
    yield from heading(run, request)
    for name in (request.program,) if request.program else PLANNED:
        yield ""
        try:
            program = programs.PROGRAMS[name](run)
        except ValueError as error:  # of a batch that the mesh does not divide
            if request.program:
                raise
            yield f"{name}: {error} ({IMAGES[name]})" if name in IMAGES else f"{name}: {error}"
            continue
        try:
            found = _compiled(program, config, request)
        except OutOfMemory as error:
            yield from refusal(error, program, config, devices)
            continue
        yield from memory(program, found.cost.memory)
        yield from times(found)
        yield from communication(found.cost.collectives)
        if name == "training":
            yield from whole_run(config, found, request.price)
        yield from (f"  warning: {warning}" for warning in found.warnings)
        if request.profile:
            yield from profile(found)


def heading(run: programs.Planned, request: Request) -> Iterator[str]:
    """Names what is planned."""
    config, mesh = run.config, run.mesh
    params = jax.eval_shape(run.network.init, jax.random.key(0))
    millions = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    slices = f"{request.slices} slices of " if request.slices > 1 else ""
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    rows = config.train.batch / mesh.shape["data"] / mesh.shape["fsdp"]
    yield f"{type(config.backbone).__name__} of {millions:.1f} M parameters, images of {config.data.size} pixels"
    yield f"on {slices}{request.topology}, {mesh.size} devices, mesh {sizes}"
    yield (
        f"batch {config.train.batch}, {rows:g} a device in {config.train.accumulate}; {config.train.precision}, remat"
        f" {config.backbone.remat}; frozen networks of {run.origin}"
    )


def memory(program: programs.Program, found: Memory) -> Iterator[str]:
    """A device's memory, by what it is for; that of code where there is code."""
    rest = {"temporaries": found.temporaries, "results": found.outputs}
    rest |= {"program": found.code} if found.code else {}
    held = programs.held(program) | rest
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in held.items())
    left = f"left {found.left / GIB:.2f}" + ("" if found.code else " for the program")
    yield f"{program.name}: memory of a device, GiB: {shown}; {left}"


def times(found: programs.Compiled) -> Iterator[str]:
    """The time of one run of the program, and what of it communication takes."""
    program, cost = found.program, found.cost
    count, row = program.mesh.size, _chip(program)
    share = program.flops / (cost.seconds * count * row.peak)
    rate = program.images / cost.seconds
    yield (
        f"  {_milliseconds(found)}: compute {cost.compute * 1e3:.1f}, attention kernels {cost.kernels * 1e3:.1f},"
        f" exposed communication {cost.exposed * 1e3:.1f} ({cost.exposed / cost.seconds:.1%}; in all"
        f" {cost.ici * 1e3:.1f} over ICI, {cost.dcn * 1e3:.1f} over DCN)"
    )
    yield f"  {rate:.1f} images/s, {rate / count * row.devices:.2f} a chip, MFU {share:.1%}"


def communication(found: Sequence[Collective]) -> Iterator[str]:
    """What a device sends, by kind of collective and by group."""
    sent: dict[Any, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
    for each in found:
        sums = sent[each.kind, each.group, each.slices]
        sums[0] += each.times
        sums[1] += each.times * each.ici_bytes
        sums[2] += each.times * each.dcn_bytes
    for (kind, group, slices), (times, ici, dcn) in sorted(sent.items()):
        across = f", {dcn / 1e6:.1f} MB over DCN" if slices > 1 else ""
        yield f"  {times} x {kind} among {group}: {ici / 1e6:.1f} MB a device over ICI{across}"


def whole_run(config: RunConfig, found: programs.Compiled, price: float | None) -> Iterator[str]:
    """What the training of `train.examples` comes to."""
    steps = math.ceil(config.train.examples / config.train.batch)
    hours = steps * found.cost.seconds / 3600
    chips = found.program.mesh.size / _chip(found.program).devices
    cost = "" if price is None else f", {hours * chips * price:,.0f} at {price:g} a chip-hour"
    yield f"  {steps:,} steps: {hours / 24:.2f} days, {hours * chips:,.0f} chip-hours{cost}"


def profile(found: programs.Compiled) -> Iterator[str]:
    """The modules and the kinds of operations that take longest."""
    for name, shares in found.profile._asdict().items():
        yield f"  {name}"
        for part, seconds in itertools.islice(shares.items(), SHOWN):
            yield f"    {seconds * 1e3:9.2f} ms {seconds / found.cost.seconds:6.1%}  {part or '(outside)'}"


def refusal(
    error: OutOfMemory, program: programs.Program, config: RunConfig, devices: Sequence[Any]
) -> Iterator[str]:
    """Reports that a program does not fit, its memory by category, and layouts that would fit."""
    given = ", ".join(f"{k} {v / GIB:.2f}" for k, v in programs.held(program).items())
    yield f"{program.name}: does not fit: {error} (of it, in GiB: {given})"
    if program.name != "training":
        yield f"  fewer images at a time ({IMAGES[program.name]}), or a larger mesh.fsdp, take less"
        return
    fitting = [x for x in layouts.estimates(config, devices) if x.fits]
    for estimate in fitting[:FOUND]:
        yield f"  would fit by arithmetic ({estimate.memory / GIB:.1f} GiB): {_flags(config, estimate.layout)}"
    if not fitting:
        yield "  by arithmetic no mesh of this slice has room to spare: take a larger one, or a smaller batch"


def search(config: RunConfig, request: Request, devices: Sequence[Any]) -> Iterator[str]:
    """Compiles the layouts that arithmetic puts first; names the fastest that fits last."""
    room = chip(devices[0].device_kind).hbm
    found = layouts.estimates(config, devices)
    fitting = [estimate for estimate in found if estimate.fits]
    yield f"{len(found)} layouts of {request.topology}, of which {len(fitting)} fit by arithmetic"
    best: list[tuple[float, layouts.Layout]] = []
    for estimate in (fitting or found)[: TRIED * request.search]:
        run = estimate.layout.applied(config)
        guess = f"arithmetic: {estimate.seconds * 1e3:.0f} ms, {estimate.memory / GIB:.1f} GiB"
        program = programs.training(programs.Planned(run, devices=devices))
        try:
            done = _compiled(program, run, request)
        except OutOfMemory as error:
            yield f"{estimate.layout}: {error} ({guess})"
            continue
        held = (room - done.cost.memory.left) / GIB
        yield f"{estimate.layout}: {_milliseconds(done)}, {held:.1f} GiB ({guess})"
        best.append((done.cost.seconds, estimate.layout))
        if len(best) == request.search:
            break
    if best:
        yield f"fastest: {_flags(config, min(best)[1])}"
    else:
        yield "none of those that were compiled fits; take a larger slice, or a smaller train.batch"


def table() -> Iterator[str]:
    """The backbones, one a line, under a heading."""
    yield ROW.format(*HEADER).rstrip()
    for name, size in SIZES.items():
        count = size.count()
        params, printed_params, params_differ = _beside(count.total.params / 1e6, size.params)
        cost, printed_cost, cost_differs = _beside(UNITS[size.unit](count), size.cost)
        yield ROW.format(
            *(name, size.source, params, printed_params, params_differ),
            *(cost, size.unit, printed_cost, cost_differs, size.note),
        ).rstrip()


def _beside(counted: float, printed: int | float) -> tuple[str, str, str]:
    """What was counted, what is printed, and by how much of it they differ."""
    if not printed:
        return f"{counted:.1f}", "", ""
    return f"{counted:.1f}", f"{printed:g}", f"{counted / printed - 1:+.1%}"


def _compiled(program: programs.Program, config: RunConfig, request: Request) -> programs.Compiled:
    if request.memory:
        return scheduled(program, config, request.topology, request.slices)
    return programs.compiled(program)


def _milliseconds(found: programs.Compiled) -> str:
    """Of one run, as exactly as they are known."""
    time = found.cost.seconds * 1e3
    return f"{time:.1f} ms" if found.generated else f"about {time:.0f} ms by roofline"


def _chip(program: programs.Program) -> Chip:
    return chip(program.mesh.devices.flat[0].device_kind)


def _flags(config: RunConfig, layout: layouts.Layout) -> str:
    name = next(name for name, kind in BACKBONES.items() if isinstance(config.backbone, kind))
    return layout.flags.replace("NAME", name)
