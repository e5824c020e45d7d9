"""Programs for TPUs in a process of their own: the compile cache cannot hold what is for devices that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def printed(code: str) -> list[str]:
    """The lines that a program of Python prints; the test is skipped where libtpu is not installed."""
    pytest.importorskip("libtpu")
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
