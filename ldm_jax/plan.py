"""What a run costs on TPUs, before one is rented; on any machine, by the TPUs' own compiler.

    python -m ldm_jax.plan --config=configs/text_to_image.py:unet-866m --topology=v5p:4x4x8 --price=4.20
    python -m ldm_jax.plan --config=configs/text_to_image.py:unet-5b --topology=v5e:16x16 --search
    python -m ldm_jax.plan --table

The first compiles the training step and the sampling program of the run for that slice, or several, and reports their
memory, their time with what of it communication takes, and what the whole run comes to. `--search` looks for the
layout: mesh, parts of a batch, recomputation. `--program=encoding` plans what makes the latents instead, `--profile`
says where the time goes. A compilation takes minutes; that of a UNet of 866 M parameters ten, of one of 5 B, or with
its parameters in parts, hours. `--memory` ends it before there is code, after a few minutes of any: what a chip holds
and sends is then the compiler's, and the time a roofline's. Needs jax[tpu]. For both kinds of time see docs/plans.

`--table` prints every backbone of `ldm_jax.models.sizes`: its parameters and the cost of a forward pass for one image,
counted layer by layer, beside what its paper prints of them. The cost is in the paper's unit at its size of latents:
A's GFLOPs have two for every multiply-add, also between queries, keys and values; B's GMACs are without these.
"""

import argparse
import collections
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from ldm_jax.models import BACKBONES
from ldm_jax.models.sizes import SIZES, UNITS
from ldm_jax.parallel import make_mesh
from ldm_jax.parallel.chips import Chip, chip
from ldm_jax.planning import layouts, programs
from ldm_jax.planning.aot import topology
from ldm_jax.planning.collectives import Collective
from ldm_jax.planning.cost import Memory, OutOfMemory
from ldm_jax.planning.scheduled import scheduled
from ldm_jax.runs.config import RunConfig
from ldm_jax.settings.command_line import UsageError, run_command

HEADER = ("backbone", "source", "M params", "printed", "", "forward", "", "printed", "", "")
ROW = "{:<22} {:<11} {:>9} {:>8} {:>7} {:>9} {:<6} {:>8} {:>7}  {}"
PLANNED = ("training", "sampling")
IMAGES = {"sampling": "sampling.batch", "encoding": "data.encode_batch"}
FOUND = 3  # layouts that `--search` compiles, if they fit
TRIED = 2  # times as many it compiles at most
SHOWN = 12  # modules in a profile
GIB = 2**30


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument("--table", action="store_true", help="print the backbones and their costs")
    text = "the slice: its kind and its chips, such as v5e:16x16, v5p:4x4x8, v6e:8x16"
    parser.add_argument("--topology", metavar="KIND:AxB", help=text)
    text = "how many of them, joined by the data-centre network (default 1)"
    parser.add_argument("--slices", type=int, default=1, metavar="N", help=text)
    text = "of a chip for an hour, in whatever currency"
    parser.add_argument("--price", type=float, metavar="AMOUNT", help=text)
    text = "one alone: training or sampling, or encoding, which makes the latents"
    parser.add_argument("--program", choices=tuple(programs.PROGRAMS), help=text)
    text = f"look for the fastest layout of the training step that fits, among the best N (default {FOUND}) that do"
    parser.add_argument("--search", type=int, nargs="?", const=FOUND, metavar="N", help=text)
    text = "what a chip holds and sends, and the time by a roofline: in minutes, where code takes the compiler hours"
    parser.add_argument("--memory", action="store_true", help=text)
    text = "where the time goes, by module and by kind of operation"
    parser.add_argument("--profile", action="store_true", help=text)


def main(flags: argparse.Namespace) -> None:
    """Prints the table, the plan, or the frontier of layouts."""
    if flags.table:
        print("\n".join(table()))
        return
    if flags.config is None or flags.topology is None:
        raise UsageError(
            "a plan takes --config=FILE and --topology=KIND:AxB; --table prints the backbones and their costs"
        )
    for name in ("slices", "search"):
        if (number := getattr(flags, name)) is not None and number < 1:
            raise UsageError(f"--{name} is {number}; it is at least 1")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot hold programs for TPUs
    devices = topology(flags.topology, flags.slices)
    for line in (search if flags.search else plan)(flags, devices):
        print(line, flush=True)


def plan(flags: argparse.Namespace, devices: Sequence[Any]) -> Iterator[str]:
    """The report on the run as its config has it."""
    config: RunConfig = flags.config
    mesh = make_mesh(config.mesh, devices)
    yield from heading(config, flags, mesh)
    for name in (flags.program,) if flags.program else PLANNED:
        yield ""
        try:
            program = programs.PROGRAMS[name](config, mesh)
        except ValueError as error:  # of a batch that the mesh does not divide
            if flags.program:
                raise
            yield f"{name}: {error} ({IMAGES[name]})" if name in IMAGES else f"{name}: {error}"
            continue
        try:
            found = _compiled(program, config, flags)
        except OutOfMemory as error:
            yield from refusal(error, program, flags, devices)
            continue
        yield from memory(program, found.cost.memory)
        yield from times(found)
        yield from communication(found.cost.collectives)
        if name == "training":
            yield from whole_run(config, found, flags.price)
        yield from (f"  warning: {warning}" for warning in found.warnings)
        if flags.profile:
            yield from profile(found)


def heading(config: RunConfig, flags: argparse.Namespace, mesh: jax.sharding.Mesh) -> Iterator[str]:
    """What is planned."""
    made = programs.parts(config, mesh)
    params = jax.eval_shape(made.network.init, jax.random.key(0))
    millions = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    slices = f"{flags.slices} slices of " if flags.slices > 1 else ""
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    rows = config.train.batch / mesh.shape["data"] / mesh.shape["fsdp"]
    yield f"{type(config.backbone).__name__} of {millions:.1f} M parameters, images of {config.data.size} pixels"
    yield f"on {slices}{flags.topology}, {mesh.size} devices, mesh {sizes}"
    yield (
        f"batch {config.train.batch}, {rows:g} a device in {config.train.accumulate}; {config.train.precision}, remat"
        f" {config.backbone.remat}; frozen networks of {made.origin}"
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
    error: OutOfMemory, program: programs.Program, flags: argparse.Namespace, devices: Sequence[Any]
) -> Iterator[str]:
    """That a program does not fit, of what it is too much, and what would fit."""
    given = ", ".join(f"{k} {v / GIB:.2f}" for k, v in programs.held(program).items())
    yield f"{program.name}: does not fit: {error} (of it, in GiB: {given})"
    if program.name != "training":
        yield f"  fewer images at a time ({IMAGES[program.name]}), or a larger mesh.fsdp, take less"
        return
    fitting = [x for x in layouts.estimates(flags.config, devices) if x.fits]
    for estimate in fitting[:FOUND]:
        yield f"  would fit by arithmetic ({estimate.memory / GIB:.1f} GiB): {_flags(flags.config, estimate.layout)}"
    if not fitting:
        yield "  by arithmetic no mesh of this slice has room to spare: take a larger one, or a smaller batch"


def search(flags: argparse.Namespace, devices: Sequence[Any]) -> Iterator[str]:
    """The layouts that arithmetic puts first, compiled; the fastest that fits last."""
    config: RunConfig = flags.config
    room = chip(devices[0].device_kind).hbm
    found = layouts.estimates(config, devices)
    fitting = [estimate for estimate in found if estimate.fits]
    yield f"{len(found)} layouts of {flags.topology}, of which {len(fitting)} fit by arithmetic"
    best: list[tuple[float, layouts.Layout]] = []
    for estimate in (fitting or found)[: TRIED * flags.search]:
        run = estimate.layout.applied(config)
        guess = f"arithmetic: {estimate.seconds * 1e3:.0f} ms, {estimate.memory / GIB:.1f} GiB"
        program = programs.training(run, make_mesh(run.mesh, devices))
        try:
            done = _compiled(program, run, flags)
        except OutOfMemory as error:
            yield f"{estimate.layout}: {error} ({guess})"
            continue
        held = (room - done.cost.memory.left) / GIB
        yield f"{estimate.layout}: {_milliseconds(done)}, {held:.1f} GiB ({guess})"
        best.append((done.cost.seconds, estimate.layout))
        if len(best) == flags.search:
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


def _compiled(
    program: programs.Program, config: RunConfig, flags: argparse.Namespace
) -> programs.Compiled:
    if flags.memory:
        return scheduled(program, config, flags.topology, flags.slices)
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


if __name__ == "__main__":
    run_command(main, RunConfig, description=__doc__, add_flags=add_flags, in_workdir=False)
