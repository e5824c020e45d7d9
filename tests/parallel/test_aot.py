"""The compiler's numbers, added up: of a program written by hand, and where libtpu is installed of compiled ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_jax.parallel.aot import cycles, instructions, topology

ROOT = Path(__file__).parents[2]
PROGRAM = """
%inner_body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %dot.1 = f32[8]{0} fusion(%p.1), calls=%f, metadata={op_name="f/dot"}, backend_config={"estimated_cycles":"7"}
  ROOT %tuple.1 = (s32[], f32[8]) tuple(%p.1, %dot.1)
}

%inner_condition (p.2: (s32[], f32[8])) -> pred[] {
  %constant.2 = s32[]{:T(128)} constant(5)
  ROOT %lt.2 = pred[] compare(%p.2, %constant.2), direction=LT
}

%outer (p.3: (s32[], f32[8])) -> (s32[], f32[8]) {
  %copy.3 = f32[8]{0} copy(%p.3), backend_config={"estimated_cycles":"11"}
  ROOT %while.3 = (s32[], f32[8]) while(%copy.3), condition=%inner_condition, body=%inner_body
}

%outer_condition (p.4: (s32[], f32[8])) -> pred[] {
  ROOT %lt.4 = pred[] compare(%p.4, %p.4), direction=LT
}

ENTRY %main (p.5: f32[8]) -> f32[8] {
  %kernel.5 = f32[8]{0} custom-call(%p.5), custom_call_target="tpu_custom_call", metadata={op_name="f/kernel"}
  %w.5 = f32[8] while(%k), condition=%outer_condition, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %reduce.5 = f32[8]{0} reduce(%while.5), to_apply=%sum, backend_config={"estimated_cycles":"2"}
}
"""


def test_loops_count_by_their_trips_also_within_each_other():
    assert cycles(PROGRAM) == 3 * (11 + 5 * 7) + 2
    found = [
        (line.operation, line.cycles, line.times, line.scope) for line in instructions(PROGRAM)
    ]
    assert found == [
        ("custom-call", 0, 1, "f/kernel"),
        ("copy", 11, 3, ""),
        ("fusion", 7, 15, "f/dot"),
        ("reduce", 2, 1, ""),
    ]


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match="without a known number of trips"):
        cycles(PROGRAM.replace('"known_trip_count":{"n":"3"}', ""))


def test_an_unknown_topology_is_said():
    with pytest.raises(ValueError, match="no compiler for the topology 'v99:2x2'"):
        topology("v99:2x2")


SCANS = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ldm_jax.parallel import MeshConfig, compiler_options, make_mesh
from ldm_jax.parallel.aot import cycles, topology

mesh = make_mesh(MeshConfig(data=1), topology("v5p:2x2x1")[:1])
matrix = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))

def repeated(length):
    def program(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=length)[0]
    return cycles(jax.jit(program).lower(matrix, matrix).compile(compiler_options(mesh)).as_text())

print(*map(repeated, (8, 16, 32)))
"""


def test_a_scan_of_equal_bodies_costs_as_many_times_one():
    """In a process of its own: the compile cache cannot hold programs for devices that are not here."""
    pytest.importorskip("libtpu")
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCANS], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    few, more, most = map(int, done.stdout.split())
    assert most - more == pytest.approx(2 * (more - few), rel=0.02)
    products = 2 * 1024**3 * 16 / 459e12 * 1.75e9  # cycles at the peak of the chip
    assert products < most - more < 5 * products
