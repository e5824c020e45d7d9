"""A program as the TPU's compiler has it before it generates code: what lies where in memory, and what is sent when.

That is there after a tenth of the time or less; the rest goes into code, with which the compiler's cycles come. Memory
and communication are so known in minutes, also of programs whose code takes hours. The compiler has no option to stop
there, but writes down what it has (`--xla_dump_to`): the process that compiles is ended when that is written.
"""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PAUSE = 0.5  # seconds between two looks
TEXT = "after_optimizations_after_buffer_assignment.txt"  # the last that is written before code
MEMORY = "after_optimizations-buffer-assignment.txt"

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*):$", re.MULTILINE)
_COLOUR = re.compile(r"\bcolor (\d+)")


class MemoryAnalysis(NamedTuple):
    """Bytes of HBM by the names that `compiled.memory_analysis()` has."""

    argument_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int
    peak_memory_in_bytes: int
    generated_code_size_in_bytes: int = 0  # there is none yet


class Schedule(NamedTuple):
    """The program's text, as `compiled.as_text()` but without cycles, and its memory."""

    text: str
    memory: MemoryAnalysis


def run_to_schedule(
    command: Sequence[str], environment: Mapping[str, str], given: str
) -> Schedule | subprocess.CompletedProcess[str]:
    """Starts a process that compiles one program for TPUs, and ends it once its schedule is written.

    `given` goes to its standard input. A process that ends by itself before is given back as it ended.
    """
    with (
        tempfile.TemporaryDirectory(prefix="schedule-") as name,
        tempfile.TemporaryFile("w+") as said,
    ):
        flags = f"{environment.get('XLA_FLAGS', '')} --xla_dump_to={name} --xla_dump_hlo_as_text"
        process = subprocess.Popen(
            command,
            env={**environment, "XLA_FLAGS": flags.strip()},
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            with process.stdin as stream:
                stream.write(given)
            while process.poll() is None and not read_schedule(Path(name)):
                time.sleep(PAUSE)
        finally:
            process.kill()
            process.wait()
        if found := read_schedule(Path(name)):
            return found
        said.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, said.read())


def read_schedule(directory: Path) -> Schedule | None:
    """What the compiler has written there, once all of it is written; of several programs the largest."""
    texts = sorted(directory.glob(f"*.{TEXT}"), key=os.path.getsize)
    if not texts or not (text := texts[-1].read_text()).rstrip().endswith("\n}"):
        return None
    memory = texts[-1].with_name(texts[-1].name.replace(TEXT, MEMORY))
    return Schedule(text, analysed(memory.read_text()))


def analysed(text: str) -> MemoryAnalysis:
    """The bytes of HBM in a list of allocations; fast memory is of another colour."""
    given = out = both = total = 0
    for size, rest in _ALLOCATION.findall(text):
        colour = _COLOUR.search(rest)
        if "thread-local" in rest or (colour and colour[1] != "0"):
            continue
        bytes_, is_out = int(size), "maybe-live-out" in rest
        total += bytes_
        given += bytes_ * ("parameter" in rest)
        out += bytes_ * is_out
        both += bytes_ * (is_out and "parameter" in rest)
    return MemoryAnalysis(given, out, both, total)
