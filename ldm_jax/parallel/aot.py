"""Programs compiled for TPUs that are not here, and the time that the compiler expects of them.

libtpu's compiler needs no TPU: `topology("v5p:2x2x1")` gives devices to shard shapes over, `jax.jit(f).lower(...)` with
such shapes compiles for them, and `cycles` adds up what the compiler writes beside every instruction.
"""

import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%[\w.\-]+ = .*? ([a-z][\w\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CALLED = {name: re.compile(name + r"=%([\w.\-]+)") for name in ("body", "condition", "to_apply")}


class Instruction(NamedTuple):
    """One line of the scheduled program that the compiler gives a cost, or that is a kernel of its own."""

    operation: str  # "fusion", "custom-call", ...
    cycles: int  # of one execution; 0 where the compiler does not know
    times: int  # executions in a run of the program
    scope: str  # where in the source it comes from: "jit(step)/jvp(UNet)/..."
    text: str


def topology(name: str) -> Sequence[jax.Device]:
    """The devices of a slice such as "v5p:2x2x1", "v5e:16x16" or "v6e:8x16".

    Raises:
      ValueError: libtpu is not installed, or knows no such topology.
    """
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU to fight over either
    try:
        return topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:  # of many kinds
        raise ValueError(
            f"no compiler for the topology {name!r} ({error}); it needs jax[tpu], and is KIND:XxYxZ"
        ) from error


def instructions(text: str) -> Iterator[Instruction]:
    """What the program `compiled.as_text()` executes, loops counted by their trips."""
    computations = _computations(text)
    yield from _walk(computations, next(name for name in computations if name == "ENTRY"), 1)


def cycles(text: str) -> int:
    """The cycles that the compiler expects of a program, without those of kernels and collectives.

    XLA's own estimate counts the body of a loop once; here it counts as often as it runs.
    """
    return sum(line.cycles * line.times for line in instructions(text))


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation by its name; that of the entry is ENTRY."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            found["ENTRY" if start[1] else start[2]] = lines = []
        else:
            lines.append(line)
    return found


def _walk(computations: dict[str, list[str]], name: str, times: int) -> Iterator[Instruction]:
    for line in computations[name]:
        operation = _OPERATION.match(line)
        if operation is None:
            continue
        kind = operation[1]
        called = {
            key: found[1] for key, pattern in _CALLED.items() if (found := pattern.search(line))
        }
        if kind == "while":
            yield from _walk(
                computations,
                called["body"],
                times * _trips(line, computations[called["condition"]]),
            )
        elif kind == "call":
            yield from _walk(computations, called["to_apply"], times)
        elif kind == "conditional":
            raise ValueError("a program with a conditional has no one number of cycles")
        cost, scope = _CYCLES.search(line), _SCOPE.search(line)
        if cost or kind == "custom-call":
            yield Instruction(
                kind, int(cost[1]) if cost else 0, times, scope[1] if scope else "", line
            )


def _trips(line: str, condition: list[str]) -> int:
    """How often a loop runs: as the compiler says, or from the bound that its counter is compared with."""
    if known := _TRIPS.search(line):
        return int(known[1])
    bounds = {int(found[1]) for text in condition if (found := _CONSTANT.search(text))}
    if len(bounds) != 1:
        raise ValueError(f"a loop without a known number of trips: {line.strip()[:200]}")
    return bounds.pop()
