"""Programs of a run compiled up to code generation, in minutes where code takes hours.

What a chip holds and sends is then as the compiler has it, the time is that of a roofline (`parallel.roofline`).
"""

import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax

from ldm_jax.parallel.chips import chip
from ldm_jax.planning import aot, programs
from ldm_jax.planning.cost import OutOfMemory, cost
from ldm_jax.planning.roofline import timed
from ldm_jax.planning.schedule import Schedule, run_to_schedule
from ldm_jax.runs.config import RunConfig
from ldm_jax.settings.schema import from_json, to_json

SIZES = "needed and available:"  # what it says then
NO_ROOM = 3  # exit status of the process that compiles: the program does not fit


def scheduled(
    program: programs.Program, config: RunConfig, topology: str, slices: int
) -> programs.Compiled:
    """Compiles a program of `programs`, of the run `config` on slices such as "v5e:16x16", without its code.

    Raises:
      OutOfMemory: it does not fit the memory of a device.
      OSError: the compiler failed.
      ValueError: as `parallel.cost.cost`.
    """
    given = {
        "config": to_json(config),
        "topology": topology,
        "slices": slices,
        "name": program.name,
    }
    with programs.progress(program.name, programs.SCHEDULE):
        command = [sys.executable, "-m", "ldm_jax.planning.scheduled"]
        found = run_to_schedule(command, os.environ, json.dumps(given))
    if not isinstance(found, Schedule):
        sizes = re.search(rf"^{SIZES} (\[.*\])$", found.stdout, re.MULTILINE)
        if found.returncode == NO_ROOM and sizes:
            raise OutOfMemory(*json.loads(sizes[1]))
        last = found.stdout.strip().splitlines()[-1:]
        raise OSError(
            f"the compiler of {program.name} ended with status {found.returncode}: {last}"
        )
    devices = list(program.mesh.devices.flat)
    text = timed(found.text, chip(devices[0].device_kind))
    return programs.Compiled(program, text, cost(text, found.memory, devices))


def compile_given(text: str) -> int:
    """What the process that compiles does; the exit status."""
    given: dict[str, Any] = json.loads(text)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    config = from_json(given["config"], RunConfig)
    devices: Sequence[Any] = aot.topology(given["topology"], given["slices"])
    program = programs.PROGRAMS[given["name"]](programs.Planned(config, devices=devices))
    try:
        programs.lowered(program).compile()
    except jax.errors.JaxRuntimeError as error:
        if (found := OutOfMemory.read(error)) is None:
            raise
        print(SIZES, json.dumps([found.needed, found.available]))
        return NO_ROOM
    return 0


if __name__ == "__main__":
    sys.exit(compile_given(sys.stdin.read()))
