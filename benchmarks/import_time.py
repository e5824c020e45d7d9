"""What `import ldm_jax` and its parts add to `import jax, flax.nnx`, in seconds.

    python benchmarks/import_time.py

The median of several fresh processes each, importing what `import jax, flax.nnx` did not.
"""

import statistics
import subprocess
import sys

MODULES = ("ldm_jax", "ldm_jax.diffusion", "ldm_jax.models.unet", "ldm_jax.settings.command_line")
REPEATS = 7

SOURCE = """
import time
import jax, flax.nnx
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def seconds(module: str) -> float:
    command = [sys.executable, "-c", SOURCE.format(module=module)]
    runs = [subprocess.run(command, capture_output=True, check=True) for _ in range(REPEATS)]
    return statistics.median(float(run.stdout) for run in runs)


def main() -> None:
    for module in MODULES:
        print(f"{module:<24} {seconds(module):.3f} s")


if __name__ == "__main__":
    main()
