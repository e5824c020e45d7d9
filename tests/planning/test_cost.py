"""Costs of programs written by hand, and where libtpu is installed of compiled ones, good and bad."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from aside import printed
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.parallel import MeshConfig, make_mesh
from ldm_jax.parallel.chips import chip
from ldm_jax.planning.cost import OutOfMemory, cost, profile, wasteful

ROOT = Path(__file__).parents[2]
V5E = chip("TPU v5e")
DEVICES = [
    SimpleNamespace(device_kind="TPU v5e", coords=(i % 2, i // 2, 0), id=i, slice_index=0)
    for i in range(8)
]


def stats(arguments=4000, outputs=3000, alias=2000, temporaries=500, code=10):
    """As the compiler counts: its `temp_size_in_bytes` has fast memory, too, and is no part of the peak."""
    return SimpleNamespace(
        argument_size_in_bytes=arguments,
        output_size_in_bytes=outputs,
        alias_size_in_bytes=alias,
        temp_size_in_bytes=2 * temporaries,
        peak_memory_in_bytes=arguments + outputs - alias + temporaries,
        generated_code_size_in_bytes=code,
    )


PROGRAM = """HloModule jit_step, num_partitions=8

%product (q: f32[8]) -> f32[8] {
  %a.1 = bf16[4096,40]{1,0:T(8,128)} parameter(0)
  %b.1 = bf16[40,512]{1,0:T(8,128)} parameter(1)
  %m.1 = bf16[4096,512] convolution(%a.1, %b.1), dim_labels=bf_io->bf, \
metadata={op_name="jit(s)/jvp(UNet)/up/dot_general"}
  ROOT %t.1 = bf16[4096,512] tanh(%m.1)
}

%taps (q.1: f32[8]) -> f32[8] {
  %a.2 = bf16[8,64,64,256]{3,0,2,1} parameter(0)
  %b.2 = bf16[3,3,256,256]{3,2,1,0} parameter(1)
  ROOT %m.2 = bf16[8,64,64,256] convolution(%a.2, %b.2), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
}

%sum (q.2: f32[8]) -> f32[8] {
  ROOT %r.3 = f32[8] reduce(%a, %b), dimensions={1}, to_apply=%add
}

%swap (q.3: f32[8]) -> f32[8] {
  ROOT %r.4 = f32[8] transpose(%a), dimensions={1,0}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %f.1 = bf16[4096,512] fusion(%p, %w), calls=%product, backend_config={"estimated_cycles":"1500"}
  %f.2 = bf16[8,64,64,256] fusion(%p, %w), calls=%taps, \
metadata={op_name="jit(s)/transpose(jvp(UNet))/while/body/up/c"}, \
backend_config={"estimated_cycles":"3000"}
  %f.3 = f32[8] fusion(%p), calls=%sum, metadata={op_name="jit(s)/jvp(UNet)/down/norm/r"}, \
backend_config={"estimated_cycles":"4500"}
  %f.4 = f32[8] fusion(%p), calls=%swap, backend_config={"estimated_cycles":"6000"}
  %k.5 = bf16[1,2,512,64] custom-call(%q), custom_call_target="tpu_custom_call", \
operand_layout_constraints={bf16[1,2,512,64], bf16[1,2,512,64]}, \
metadata={op_name="jit(s)/jvp(UNet)/down/splash_mha_fwd"}
  ROOT %g.6 = f32[1024,256] all-gather(%p), replica_groups={}, metadata={op_name="jit(s)/jvp(UNet)/up/gather"}
}
"""
MICRO = 1e-6
KERNEL = 2 * 2 * 2 * 512 * 512 * 64
GATHER = 7 / 8 * 2**20 / (2 * V5E.link)


def test_a_program_takes_what_it_computes_its_kernels_and_its_exposed_collectives():
    found = cost(PROGRAM, stats(), DEVICES)
    assert found.compute == pytest.approx(10 * MICRO)
    assert found.kernel_flops == KERNEL
    assert found.kernels == pytest.approx(KERNEL / (0.4 * 197e12))
    assert (found.ici, found.dcn, found.exposed) == (
        pytest.approx(GATHER),
        0,
        pytest.approx(GATHER),
    )
    assert found.seconds == pytest.approx(found.compute + found.kernels + found.exposed)
    assert [each.kind for each in found.collectives] == ["all-gather"]


def test_memory_is_what_lies_there_during_a_run():
    """Outputs that take the place of arguments need none of their own."""
    memory = cost(PROGRAM, stats(), DEVICES).memory
    assert memory[:4] == (4000, 1000, 500, 10)
    assert sum(memory) == int(V5E.hbm)


def test_a_program_whose_code_has_no_room_beside_it_does_not_fit():
    with pytest.raises(OutOfMemory, match=r"needs 15.8\d GiB a device, which has 15.75"):
        cost(PROGRAM, stats(temporaries=int(V5E.hbm) - 5000, code=2**27), DEVICES)


@pytest.mark.parametrize("wrong", [{"alias": 9000}, {"temporaries": -1}])
def test_a_cost_that_cannot_be_is_an_error(wrong):
    with pytest.raises(ValueError, match="the program's cost cannot be"):
        cost(PROGRAM, stats(**wrong), DEVICES)


def test_profiles_divide_the_time_by_kind_and_by_module():
    found, total = profile(PROGRAM, DEVICES, depth=2), cost(PROGRAM, stats(), DEVICES).seconds
    assert sum(found.kinds.values()) == pytest.approx(total, rel=1e-12)
    assert sum(found.modules.values()) == pytest.approx(total, rel=1e-12)
    kernel = KERNEL / (0.4 * 197e12)
    assert found.kinds == pytest.approx(
        {
            **{"dot": MICRO, "convolution": 2 * MICRO, "reduction": 3 * MICRO, "copy": 4 * MICRO},
            **{"attention kernel": kernel, "collective": GATHER},
        }
    )
    assert found.modules == pytest.approx(
        {"UNet/up": 3 * MICRO + GATHER, "UNet/down": 3 * MICRO + kernel, "(no scope)": 4 * MICRO}
    )


def test_a_profile_begins_with_what_costs_most():
    for shares in profile(PROGRAM, DEVICES):
        assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_products_that_do_not_fill_the_matrix_unit_are_warned_of():
    """40 of 128; the convolution fills it."""
    (warning,) = wasteful(PROGRAM, DEVICES)
    assert warning.startswith("a dot of 4096 x 40 by 40 x 512 fills 31% of the matrix unit")
    assert wasteful(PROGRAM.replace("40", "120"), DEVICES) == []


def placed(mesh, shape, *axes):
    return jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes))
    )


def test_large_arguments_that_lie_whole_on_every_device_are_warned_of():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    large = (2048, 4096)
    whole = {"params": {"up": placed(mesh, large), "bias": placed(mesh, (4096,))}}
    (_, warning) = wasteful(PROGRAM.replace("40", "120"), DEVICES, whole)
    assert warning == "params/up (32 MiB) is whole on every device, ['fsdp'] could divide it"
    odd = {"up": placed(mesh, (2047, 4097)), "down": placed(mesh, large, None, "fsdp")}
    assert len(wasteful(PROGRAM.replace("40", "120"), DEVICES, odd)) == 1
    repeated = make_mesh(MeshConfig(data=8))
    assert len(wasteful(PROGRAM.replace("40", "120"), DEVICES, [placed(repeated, large)])) == 1


def test_gathers_are_warned_of_unless_they_are_of_an_argument():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    text = PROGRAM.replace("40", "120")
    (warning,) = wasteful(text, DEVICES, [placed(mesh, (64, 64), "fsdp")])
    assert warning.startswith("1.0 MiB that are no argument are gathered on every device of 8")
    assert wasteful(text, DEVICES, [placed(mesh, (256, 1024), "fsdp")]) == []
    assert wasteful(text, DEVICES, [placed(mesh, (12, 1024, 256), None, "fsdp")]) == []  # a layer


@pytest.mark.parametrize(
    ("text", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (32.50G) exceeds available HBM (15.75G). HLO module: jit_step.",
            32.5 * 2**30,
            15.75 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 1.25T of 15.75G hbm. Exceeded hbm capacity by 1.23T.",
            1.25 * 2**40,
            15.75 * 2**30,
        ),
    ],
)
def test_a_refusal_tells_what_is_needed_and_what_is_there(text, needed, available):
    found = OutOfMemory.read(RuntimeError(text))
    assert (found.needed, found.available) == (needed, available)
    assert f"needs {needed / 2**30:.2f} GiB" in str(found)


def test_other_errors_are_no_refusals():
    assert OutOfMemory.read(ValueError("15.75G")) is None
    assert OutOfMemory.read(RuntimeError("RESOURCE_EXHAUSTED: of something else")) is None


COMPILED = """
import json
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ldm_jax.parallel import MeshConfig, make_mesh
from ldm_jax.planning.aot import topology
from ldm_jax.planning.cost import cost, profile, wasteful

def show(name, mesh, function, *arguments):
    devices = list(mesh.devices.flat)
    compiled = jax.jit(function).lower(*arguments).compile()
    text = compiled.as_text()
    found = cost(text, compiled.memory_analysis(), devices)
    kinds = profile(text, devices).kinds
    warnings = wasteful(text, devices, arguments)
    print(json.dumps([name, [found.seconds, found.memory, kinds, warnings]]))

one = make_mesh(MeshConfig(), topology("v5e:2x2")[:1])
all_ = make_mesh(MeshConfig(data=1, fsdp=8), topology("v5e:2x4"))

def given(mesh, shape, *axes):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

for width in (128, 32):  # products of as many operations
    heads = 16 * 128 // width
    scores = lambda q, k: jax.lax.dot_general(q, k, (((2,), (2,)), ((0,), (0,))))
    show(f"width {width}", one, scores, *[given(one, (heads, 1024, width))] * 2)

def layers(*rows):
    def run(x, v, w):
        hidden = jnp.tanh(x @ v)
        hidden = jax.lax.with_sharding_constraint(hidden, NamedSharding(all_, PartitionSpec(*rows)))
        return hidden @ w
    return run

x, v = given(all_, (4096, 256), "fsdp"), given(all_, (256, 2048), "fsdp")
show("divided", all_, layers("fsdp"), x, v, given(all_, (2048, 6144), "fsdp"))
show("gathered", all_, layers(), x, v, given(all_, (2048, 6144)))
"""


@pytest.fixture(scope="module")
def compiled():
    return dict(json.loads(row) for row in printed(COMPILED))


def test_narrow_products_are_slower_and_warned_of(compiled):
    wide, narrow = compiled["width 128"], compiled["width 32"]
    assert narrow[0] > 2 * wide[0]
    assert wide[3] == []
    (warning,) = narrow[3]
    assert "32 by 32 x 1024 fills 25% of the matrix unit" in warning
    assert wide[2].keys() >= {"dot"}


def test_gathered_activations_are_slower_and_warned_of_and_so_is_a_whole_parameter(compiled):
    good, bad = compiled["divided"], compiled["gathered"]
    assert bad[0] > 1.5 * good[0]
    assert good[3] == []
    gathered, whole = bad[3]
    assert gathered.startswith("16.0 MiB that are no argument are gathered on every device of 8")
    assert whole == "2 (24 MiB) is whole on every device, ['fsdp'] could divide it"


def test_memory_of_a_device_holds_its_share(compiled):
    arguments, outputs, temporaries, code, left = compiled["divided"][1]
    assert arguments == (4096 * 256 + 256 * 2048 + 2048 * 6144) * 2 // 8
    assert outputs == 4096 * 6144 * 2 // 8
    assert arguments + outputs + temporaries + code + left == int(V5E.hbm)
