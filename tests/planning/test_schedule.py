"""A process that is ended once its schedule is written, and the memory that a schedule says."""

import sys

import pytest

from ldm_jax.planning.schedule import MEMORY, TEXT, MemoryAnalysis, analysed, run_to_schedule

ALLOCATIONS = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <2 add.11 @0> (size=512,offset=0): bf16[]{:T(256)}
allocation 1: size 300, output shape is |f32[75]|, maybe-live-out:
allocation 2: size 4000, parameter 0, shape |f32[1000]| at ShapeIndex {}, maybe-live-out:
allocation 3: size 800, parameter 1, shape |f32[200]| at ShapeIndex {}:
allocation 4: size 64, constant:
allocation 5: size 90000, preallocated-temp:
allocation 6: size 8, color 2, preallocated-temp:
allocation 7: size 9634304, color 1, preallocated-temp:
"""
COMPILER = """
import os, re, sys, time
directory = re.search(r"--xla_dump_to=(\\S+)", os.environ["XLA_FLAGS"])[1]
for name, text in ({written!r}).items():
    with open(f"{{directory}}/module_0003.jit_step.cl_1.{{name}}", "w") as file:
        file.write(text)
print("given", sys.stdin.read())
time.sleep({seconds})
sys.exit(5)
"""


def compiler(written, seconds=0):
    return [sys.executable, "-c", COMPILER.format(written=written, seconds=seconds)]


def test_memory_is_that_of_hbm_by_what_it_is_for():
    given, outputs, both = 4800, 4300, 4000
    total = 300 + 4000 + 800 + 64 + 90000
    assert analysed(ALLOCATIONS) == MemoryAnalysis(given, outputs, both, total)


def test_a_process_is_ended_once_its_schedule_is_written():
    text = "HloModule jit_step\n\nENTRY %main () -> f32[] {\n}\n"
    command = compiler({MEMORY: ALLOCATIONS, TEXT: text}, seconds=600)
    found = run_to_schedule(command, {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}, "")
    assert found.text == text
    assert found.memory == analysed(ALLOCATIONS)


@pytest.mark.parametrize("written", [{}, {MEMORY: ALLOCATIONS, TEXT: "ENTRY %main {\n  %a = f32"}])
def test_a_process_that_ends_without_one_is_given_back(written):
    found = run_to_schedule(compiler(written), {}, "words")
    assert (found.returncode, found.stdout) == (5, "given words\n")
