"""The compiler's numbers, added up: of a program written by hand, and where libtpu is installed of compiled ones."""

from pathlib import Path

import pytest
from aside import printed

from ldm_jax.parallel.chips import chip
from ldm_jax.planning.aot import (
    REACHED,
    cycles,
    instructions,
    kernel_flops,
    modules,
    seconds,
    topology,
)

ROOT = Path(__file__).parents[2]
PROGRAM = """
%inner_body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %by.1 = s32[]{:T(128)} constant(1)
  %next.1 = s32[] add(%i.1, %by.1)
  %dot.1 = f32[8]{0} fusion(%p.1), calls=%f, metadata={op_name="f/dot"}, backend_config={"estimated_cycles":"7"}
  ROOT %tuple.1 = (s32[], f32[8]) tuple(%next.1, %dot.1)
}

%inner_condition (p.2: (s32[], f32[8])) -> pred[] {
  %constant.2 = s32[]{:T(128)} constant(5)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt.2 = pred[] compare(%i.2, %constant.2), direction=LT
}

%outer (p.3: (s32[], f32[8])) -> (s32[], f32[8]) {
  %from.3 = s32[]{:T(128)} constant(0)
  %start.3 = s32[]{:T(128)} copy(%from.3)
  %copy.3 = f32[8]{0} copy(%p.3), backend_config={"estimated_cycles":"11"}
  %tuple.3 = (s32[], f32[8]) tuple(%start.3, %copy.3)
  ROOT %while.3 = (s32[], f32[8]) while(%tuple.3), condition=%inner_condition, body=%inner_body
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
    found = {
        (line.operation, line.cycles, line.times, line.scope) for line in instructions(PROGRAM)
    }
    assert found == {
        ("custom-call", 0, 1, "f/kernel"),
        ("copy", 11, 3, ""),
        ("fusion", 7, 15, "f/dot"),
        ("reduce", 2, 1, ""),
    }


@pytest.mark.parametrize(("start", "step", "trips"), [(0, 1, 5), (1, 1, 4), (0, 2, 3), (3, 2, 1)])
def test_a_loop_runs_from_its_start_to_its_bound_in_its_steps(start, step, trips):
    """The compiler takes an iteration out of a loop by letting it start at one."""
    text = PROGRAM.replace(
        "%from.3 = s32[]{:T(128)} constant(0)", f"%from.3 = s32[] constant({start})"
    )
    text = text.replace("%by.1 = s32[]{:T(128)} constant(1)", f"%by.1 = s32[] constant({step})")
    assert cycles(text) == 3 * (11 + trips * 7) + 2


@pytest.mark.parametrize(
    ("known", "unknown"),
    [
        ('"known_trip_count":{"n":"3"}', ""),
        ("constant(5)", "parameter(1)"),
        ("constant(0)", "parameter(1)"),
        ("index=0\n  ROOT %lt.2", "\n  ROOT %lt.2"),
        ("direction=LT", "direction=NE"),
    ],
)
def test_a_loop_of_unknown_length_is_an_error(known, unknown):
    assert known in PROGRAM
    with pytest.raises(ValueError, match="without a known number of trips"):
        cycles(PROGRAM.replace(known, unknown))


KERNEL = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %k.1 = bf16[2,3,512,64] custom-call(%q, %k, %v), custom_call_target="tpu_custom_call", \
operand_layout_constraints={s8[1,1,1]{2,1,0}, bf16[2,3,64,512]{3,2,1,0}, bf16[2,3,64,128]{3,2,1,0}, bf16[2,3,64,128]}, \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="f/attention/NAME"}
}
"""


@pytest.mark.parametrize(
    ("name", "products"), [("splash_mha_fwd_no_residuals", 2), ("splash_mha_dkv_residuals", 5)]
)
def test_an_attention_kernel_costs_its_products(name, products):
    """Of 512 queries of width 64 and 128 keys, two examples, three heads; its attributes go on in the next rows."""
    (kernel,) = instructions(KERNEL.replace("NAME", name))
    flops = products * 2 * 2 * 3 * 512 * 128 * 64
    assert kernel_flops(kernel) == flops
    row = chip("TPU v5")
    assert seconds(kernel, row) == pytest.approx(flops / (REACHED * 459e12))


def test_a_kernel_of_another_kind_is_an_error():
    (kernel,) = instructions(KERNEL)
    with pytest.raises(ValueError, match="a kernel of unknown cost: f/attention/NAME"):
        kernel_flops(kernel)


def test_a_row_of_the_table_of_frames_belongs_to_the_modules_that_call_it():
    text = """HloModule jit_step, is_scheduled=true

FileNames
1 "a.py"

FunctionNames
1 "<module>"
2 "UNet.__call__"
3 "ResBlock.__call__"
4 "tanh"
5 "make_step.<locals>.step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=5 end_line=5 column=4 end_column=29}
2 {file_name_id=1 function_name_id=2 line=5 end_line=5 column=4 end_column=29}
3 {file_name_id=1 function_name_id=3 line=5 end_line=5 column=4 end_column=29}
4 {file_name_id=1 function_name_id=4 line=5 end_line=5 column=4 end_column=29}
5 {file_name_id=1 function_name_id=5 line=5 end_line=5 column=4 end_column=29}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=4}
5 {file_location_id=5 parent_frame_id=2}
"""
    found = modules(text + PROGRAM)
    assert found[4] == found[3] == ("UNet", "ResBlock")
    assert found[2] == ("UNet",)
    assert found[5] == ("make_step",)
    assert modules(PROGRAM) == {}


def test_an_unknown_topology_is_said():
    with pytest.raises(ValueError, match="no compiler for the topology 'v99:2x2'"):
        topology("v99:2x2")


COMPILED = """
import jax, jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding, PartitionSpec
from ldm_jax.parallel import MeshConfig, compiler_options, make_mesh
from ldm_jax.planning.aot import cycles, instructions, kernel_flops, topology

mesh = make_mesh(MeshConfig(data=1), topology("v5p:2x2x1")[:1])

def given(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))

def compiled(function, *shapes):
    return jax.jit(function).lower(*shapes).compile(compiler_options(mesh)).as_text()

def repeated(length):
    def program(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=length)[0]
    return cycles(compiled(program, given(1024, 1024), given(1024, 1024)))

def attention(q, k, v):
    mask = splash_attention.MultiHeadMask([splash_attention.FullMask((512, 256))] * 4)
    sizes = {f"block_{name}": 256 for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")}
    blocks = splash_attention.BlockSizes(use_fused_bwd_kernel=True, **sizes)
    kernel = splash_attention.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)
    return jax.vmap(kernel)(q, k, v).astype(jnp.float32).sum()

def kernels():
    shapes = given(2, 4, 512, 64), given(2, 4, 256, 64), given(2, 4, 256, 64)
    text = compiled(jax.grad(attention, (0, 1, 2)), *shapes)
    return sum(line.times * kernel_flops(line) for line in instructions(text))

print(*map(repeated, (8, 16, 32)), kernels())
"""


@pytest.fixture(scope="module")
def compiled():
    """Numbers from a process of its own: the compile cache cannot hold programs for devices that are not here."""
    return [float(number) for number in printed(COMPILED)[0].split()]


def test_a_scan_of_equal_bodies_costs_as_many_times_one(compiled):
    few, more, most, _ = compiled
    assert most - more == pytest.approx(2 * (more - few), rel=0.02)
    products = 2 * 1024**3 * 16 / 459e12 * 1.75e9  # cycles at the peak of the chip
    assert products < most - more < 5 * products


def test_the_kernels_of_a_backward_pass_cost_seven_products(compiled):
    *_, flops = compiled
    assert flops == 7 * 2 * 2 * 4 * 512 * 256 * 64
