"""What the demo costs: seconds, how many of them are compiling, and the most memory that a command takes.

    python benchmarks/demo.py --workdir=runs/demo-cost [--config=configs/demo.py]

Runs the commands of `make demo` in a new directory, one after the other, and has JAX log what it compiles.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

COMPILED = re.compile(r"Finished (?:XLA compilation|jaxpr to MLIR).* in ([0-9.e+-]+) sec")
DEVICES = "--xla_force_host_platform_device_count=2"  # as in the Makefile


class Cost(NamedTuple):
    command: str
    seconds: float
    compiling: float
    gigabytes: float


def measure(command: str, words: list[str], log: Path) -> Cost:
    environment = {"XLA_FLAGS": DEVICES, **os.environ, "JAX_LOG_COMPILES": "1"}
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", f"ldm_jax.{command}", *words],
            env=environment,
            stdout=file,
            stderr=file,
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"ldm_jax.{command} failed, see {log}")
    compiling = sum(map(float, COMPILED.findall(log.read_text())))
    return Cost(command, time.perf_counter() - start, compiling, usage.ru_maxrss * 1024 / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--config", default="configs/demo.py")
    arguments = parser.parse_args()
    if arguments.workdir.exists():
        raise SystemExit(f"{arguments.workdir} exists; the cost is that of a run from the start")
    arguments.workdir.mkdir(parents=True)
    where, costs = f"--workdir={arguments.workdir}", []
    for command, words in (
        ("encode", [f"--config={arguments.config}"]),
        ("train", []),
        ("report", []),
    ):
        costs.append(measure(command, [where, *words], arguments.workdir / f"{command}.log"))
        print(
            "{:<8} {:6.0f} s, {:5.0f} s of them compiling, {:.1f} GB".format(*costs[-1]), flush=True
        )
    seconds, compiling = (
        sum(getattr(cost, name) for cost in costs) for name in ("seconds", "compiling")
    )
    share, most = compiling / seconds, max(cost.gigabytes for cost in costs)
    print(
        f"{'together':<8} {seconds:6.0f} s, {compiling:5.0f} s of them compiling ({share:.0%}), {most:.1f} GB"
    )


if __name__ == "__main__":
    main()
