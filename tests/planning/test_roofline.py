"""Rooflines against arithmetic: of programs written by hand, and where libtpu is installed of compiled ones."""

import json

import pytest
from aside import printed

from ldm_jax.parallel.chips import chip
from ldm_jax.planning.aot import cycles, parse
from ldm_jax.planning.products import products
from ldm_jax.planning.roofline import ELEMENTS, HBM, PRODUCTS, START, timed

V5E = chip("TPU v5e")


def time_of(lines, called="", row=V5E):
    """Cycles of an entry of these lines."""
    text = f"HloModule jit_f\n\n{called}\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n{lines}\n}}\n"
    return cycles(timed(text, row))


def hbm(size, row=V5E):
    return START + size / (HBM * row.bandwidth) * row.clock


def test_a_product_of_matrices_takes_its_operations():
    found = time_of(
        """  %a = bf16[4096,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[1024,2048]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[4096,2048]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf"""
    )
    seconds = 2 * 4096 * 1024 * 2048 / (PRODUCTS * V5E.peak)
    assert found == pytest.approx(START + seconds * V5E.clock, rel=1e-4)


FORWARD = """  %x = bf16[8,32,32,256]{3,0,2,1} parameter(0)
  %w = bf16[3,3,256,512]{3,2,1,0} parameter(1)
  ROOT %y = bf16[8,32,32,512]{3,0,2,1} convolution(%x, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"""
TO_INPUT = """  %y = bf16[8,32,32,512]{3,0,2,1} parameter(0)
  %w = bf16[3,3,256,512]{3,2,1,0} parameter(1)
  ROOT %x = bf16[8,32,32,256]{3,0,2,1} convolution(%y, %w), window={size=3x3 pad=1_1x1_1 rhs_reversal=1x1}, \
dim_labels=b01f_01oi->b01f"""
TO_KERNEL = """  %x = bf16[8,32,32,256]{3,0,2,1} parameter(0)
  %y = bf16[8,32,32,512]{3,0,2,1} parameter(1)
  ROOT %w = bf16[3,3,256,512]{3,2,1,0} convolution(%x, %y), window={size=32x32 pad=1_1x1_1}, \
dim_labels=f01b_i01o->01bf"""
GROUPS = """  %x = bf16[8,32,32,256]{3,0,2,1} parameter(0)
  %w = bf16[3,3,64,512]{3,2,1,0} parameter(1)
  ROOT %y = bf16[8,32,32,512]{3,0,2,1} convolution(%x, %w), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_01io->b01f, feature_group_count=4"""
BATCH = """  %q = bf16[8,16,256,64]{3,2,1,0} parameter(0)
  %k = bf16[8,16,512,64]{3,2,1,0} parameter(1)
  ROOT %s = f32[8,16,256,512]{3,2,1,0} convolution(%q, %k), window={size=8x16 stride=7x15 lhs_dilate=8x16}, \
dim_labels=01bf_01oi->01bf"""


@pytest.mark.parametrize(
    ("lines", "multiplied"),
    [
        (FORWARD, 8 * 32 * 32 * 9 * 256 * 512),
        (TO_INPUT, 8 * 32 * 32 * 9 * 256 * 512),
        (TO_KERNEL, 8 * 32 * 32 * 9 * 256 * 512),
        (GROUPS, 8 * 32 * 32 * 9 * 64 * 512),
        (BATCH, 8 * 16 * 256 * 512 * 64),
    ],
)
def test_a_convolution_multiplies_as_often_backwards_as_forwards(lines, multiplied):
    computations = parse(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{lines}\n}}\n")
    (found,) = products(computations, computations["ENTRY"], computations["ENTRY"][-1])
    assert found.flops == 2 * multiplied


MAP = """%map (p.1: f32[8]) -> f32[8] {
  %x.1 = f32[4096,4096]{1,0:T(8,128)} parameter(0)
  ROOT %t.1 = f32[4096,4096]{1,0:T(8,128)} tanh(%x.1)
}"""
GIVEN = "  %x = f32[4096,4096]{1,0:T(8,128)SPACE} parameter(0)\n"
MAPPED = "  ROOT %y = f32[4096,4096]{1,0:T(8,128)SPACE} fusion(%x), calls=%map"


def test_what_lies_in_hbm_takes_its_bytes_and_what_lies_in_fast_memory_its_elements():
    lines, size = GIVEN + MAPPED, 4096 * 4096
    assert time_of(lines.replace("SPACE", ""), MAP) == pytest.approx(hbm(2 * 4 * size), rel=1e-4)
    fast = time_of(lines.replace("SPACE", "S(1)"), MAP)
    assert fast == pytest.approx(START + 2 * size / ELEMENTS, rel=1e-4)


SLICED = """%sliced (p.2: f32[8]) -> f32[8] {
  %all.2 = f32[28,4096,4096]{2,1,0:T(8,128)} parameter(0)
  %i.2 = s32[] parameter(1)
  %one.2 = f32[1,4096,4096]{2,1,0:T(8,128)} dynamic-slice(%all.2, %i.2), dynamic_slice_sizes={1,4096,4096}
  %flat.2 = f32[4096,4096]{1,0:T(8,128)} bitcast(%one.2)
  %changed.2 = f32[4096,4096]{1,0:T(8,128)} negate(%flat.2)
  %back.2 = f32[1,4096,4096]{2,1,0:T(8,128)} bitcast(%changed.2)
  ROOT %in.2 = f32[28,4096,4096]{2,1,0:T(8,128)} dynamic-update-slice(%all.2, %back.2, %i.2)
}"""


def test_of_what_is_sliced_and_updated_in_place_the_slice_counts():
    found = time_of(
        """  %all = f32[28,4096,4096]{2,1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  ROOT %new = f32[28,4096,4096]{2,1,0:T(8,128)} fusion(%all, %i), calls=%sliced""",
        SLICED,
    )
    assert found == pytest.approx(hbm(2 * 4 * 4096 * 4096), rel=1e-4)


CARRYING = """%carrying (p.5: f32[8]) -> f32[8] {
  %a.5 = bf16[4096,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %b.5 = bf16[1024,2048]{1,0:T(8,128)(2,1)} parameter(1)
  %part.5 = bf16[4096,4096]{1,0:T(8,128)(2,1)} parameter(2)
  %whole.5 = bf16[65536,4096]{1,0:T(8,128)(2,1)} all-gather(%part.5), dimensions={0}
  %c.5 = bf16[4096,2048]{1,0:T(8,128)(2,1)} convolution(%a.5, %b.5), dim_labels=bf_io->bf
  ROOT %both.5 = (bf16[4096,2048]{1,0}, bf16[65536,4096]{1,0}) tuple(%c.5, %whole.5)
}"""


def test_a_product_that_carries_a_collective_along_takes_as_long_as_it_does_alone():
    found = time_of(
        """  %a = bf16[4096,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[1024,2048]{1,0:T(8,128)(2,1)} parameter(1)
  %part = bf16[4096,4096]{1,0:T(8,128)(2,1)} parameter(2)
  ROOT %both = (bf16[4096,2048]{1,0}, bf16[65536,4096]{1,0}) fusion(%a, %b, %part), calls=%carrying""",
        CARRYING,
    )
    seconds = 2 * 4096 * 1024 * 2048 / (PRODUCTS * V5E.peak)
    assert found == pytest.approx(START + seconds * V5E.clock, rel=1e-4)


LOOP = """%body (p.3: f32[8]) -> f32[8] {
  %x.3 = f32[4096,4096]{1,0:T(8,128)} get-tuple-element(%p.3), index=0
  ROOT %y.3 = f32[4096,4096]{1,0:T(8,128)} negate(%x.3)
}

%test (p.4: f32[8]) -> pred[] {
}"""


@pytest.mark.parametrize("trips", [1, 28])
def test_a_loop_takes_as_often_as_it_runs_what_its_body_takes(trips):
    loop = f"""  ROOT %l = f32[4096,4096] while(%x), condition=%test, body=%body, \
backend_config={{"known_trip_count":{{"n":"{trips}"}}}}"""
    assert time_of(loop, LOOP) == pytest.approx(trips * hbm(2 * 4 * 4096 * 4096), rel=1e-4)


def test_names_scalars_and_transfers_in_the_background_take_nothing():
    lines = """  %x = f32[4096,4096]{1,0:T(8,128)} parameter(0)
  %s = f32[]{:T(128)} multiply(%a, %b)
  %b = f32[16777216]{0:T(1024)} bitcast(%x)
  %c = (f32[4096,4096]{1,0:T(8,128)S(1)}, f32[4096,4096]{1,0:T(8,128)}, u32[]) copy-start(%x)
  %d = f32[4096,4096]{1,0:T(8,128)S(1)} copy-done(%c)
  %g = f32[4096,4096]{1,0:T(8,128)} all-reduce(%x), replica_groups={}"""
    assert time_of(lines) == 0


def test_a_roofline_takes_the_place_of_the_compilers_cycles():
    lines = GIVEN + MAPPED + ', backend_config={"estimated_cycles":"7"}'
    assert time_of(lines.replace("SPACE", ""), MAP) == pytest.approx(hbm(8 * 4096**2), rel=1e-4)


COMPILED = """
import json
import jax, jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ldm_jax.planning.aot import cycles, topology
from ldm_jax.parallel.chips import chip
from ldm_jax.planning.roofline import timed

def both(function, device, *shapes):
    whole = NamedSharding(Mesh(np.array([device]), "x"), PartitionSpec())
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape, dtype in shapes]
    text = jax.jit(function).lower(*given).compile().as_text()
    return cycles(text), cycles(timed(text, chip(device.device_kind)))

def convolve(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

def scan(n):
    return lambda x, w: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=n)[0]

image, kernel = ((8, 32, 32, 256), jnp.bfloat16), ((3, 3, 256, 256), jnp.bfloat16)
matrix = ((2048, 2048), jnp.bfloat16)
for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    device = topology(name)[0]
    rows = {
        "matmul": both(jnp.matmul, device, matrix, matrix),
        "forward": both(convolve, device, image, kernel),
        "backward": both(lambda x, w, y: jax.vjp(convolve, x, w)[1](y), device, image, kernel, image),
        "map": both(lambda x: x + 1, device, ((4096, 4096), jnp.float32)),
        "four": both(scan(4), device, matrix, matrix),
        "forty": both(scan(40), device, matrix, matrix),
    }
    print(json.dumps([name, rows]))
"""


def test_a_roofline_comes_near_the_compilers_cycles():
    for name, rows in map(json.loads, printed(COMPILED)):
        for what, (compiler, roofline) in rows.items():
            assert 0.7 < roofline / compiler < 1.5, (name, what)
        assert rows["forty"][1] == pytest.approx(10 * rows["four"][1], rel=0.1)
