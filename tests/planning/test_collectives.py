"""Collectives read from programs written by hand, and where libtpu is installed from the compiler's."""

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from aside import printed

from ldm_jax.parallel.chips import chip
from ldm_jax.planning.collectives import collectives

ROOT = Path(__file__).parents[2]
V5E = chip("TPU v5e")
BACK = 'backend_config={"estimated_cycles":"7500"}'  # 5 us of a v5e


def devices(slices=1):
    """2 x 4 chips of v5e a slice, numbered as libtpu numbers them where there are several."""
    places = product(range(slices), range(4), range(2))
    return [
        SimpleNamespace(
            device_kind="TPU v5e", coords=(x, y, 0), slice_index=s, id=100_000 * (s + 1) + 2 * y + x
        )
        for s, y, x in places
    ]


def program(*lines, others="", partitions=8):
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f"HloModule jit_step, num_partitions={partitions}\n{others}\n"
        f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    )


def collective(
    kind, groups="replica_groups={{0,1,2,3,4,5,6,7}}", shape="f32[1024,256]{1,0:T(8,128)}"
):
    return f'%c = {shape} {kind}(%p), channel_id=1, {groups}, metadata={{op_name="f/{kind}"}}'


MIB = 2**20


@pytest.mark.parametrize(
    ("kind", "array", "sent"),
    [
        ("all-gather", MIB, 7 / 8 * MIB),
        ("all-reduce", MIB, 2 * 7 / 8 * MIB),
        ("reduce-scatter", 8 * MIB, 7 * MIB),  # its result is a device's part
        ("all-to-all", MIB, 7 / 8 * MIB),
    ],
)
def test_bytes_are_those_of_a_ring(kind, array, sent):
    (found,) = collectives(program(collective(kind)), devices())
    assert (found.kind, found.bytes, found.dtype, found.scope) == (kind, array, "f32", f"f/{kind}")
    assert (found.group, found.slices, found.times) == (8, 1, 1)
    assert (found.ici_bytes, found.dcn_bytes) == (pytest.approx(sent), 0)
    assert found.exposed == found.ici_seconds > 0 == found.dcn_seconds


def test_a_group_sends_over_both_dimensions_that_it_spans():
    (found,) = collectives(program(collective("all-gather")), devices())
    assert found.ici_seconds == pytest.approx(7 / 8 * MIB / (2 * V5E.link))
    (row,) = collectives(
        program(collective("all-gather", "replica_groups={{0,2,4,6},{1,3,5,7}}")), devices()
    )
    assert row.ici_seconds == pytest.approx(3 / 4 * MIB / V5E.link)


def test_several_arrays_are_one_collective():
    shape = "(f32[1024,256]{1,0}, f32[1024,256]{1,0})"
    (found,) = collectives(program(collective("all-reduce", shape=shape)), devices())
    assert found.bytes == 2 * MIB


def test_a_permutation_takes_as_long_as_its_longest_way():
    near, far = ("{{0,1},{1,0}}", "{{0,6},{6,0}}")
    (one,) = collectives(
        program(collective("collective-permute", f"source_target_pairs={near}")), devices()
    )
    (three,) = collectives(
        program(collective("collective-permute", f"source_target_pairs={far}")), devices()
    )
    assert one.ici_bytes == three.ici_bytes == MIB
    assert one.ici_seconds == pytest.approx(MIB / V5E.link)
    assert three.ici_seconds == pytest.approx(3 * MIB / V5E.link)


@pytest.mark.parametrize(
    ("groups", "size", "slices"),
    [
        ("{{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}", 4, 1),
        ("{{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}", 2, 2),
        ("{}", 16, 2),
        ("[2,8]<=[16]", 8, 1),
        ("[8,2]<=[2,8]T(1,0)", 2, 2),
        ("[4,4]<=[2,4,2]T(1,0,2)", 4, 2),
        ("mesh['a'=2,'b'=8] {'b'}", 8, 1),
        ("mesh['a'=2,'b'=8] {'a'}", 2, 2),
        ("mesh['a'=2,'b'=8] {'a','b'}", 16, 2),
        ("mesh['a'=16] {'a':(2)8}", 8, 1),
        ("mesh['a'=16] {'a':(1)2}", 2, 2),
        ("mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'a'}", 8, 1),
        ("mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'b'}", 2, 2),
    ],
)
def test_groups_are_understood_in_every_notation(groups, size, slices):
    """Devices 0 to 7 are one slice and 8 to 15 another, so that a group tells whom it holds by the slices it spans."""
    text = program(collective("all-reduce", f"replica_groups={groups}"), partitions=16)
    (found,) = collectives(text, devices(2))
    assert (found.group, found.slices) == (size, slices)


def test_between_slices_a_device_sends_its_share_of_the_array():
    text = program(collective("all-reduce", "replica_groups={}"), partitions=16)
    (found,) = collectives(text, devices(2))
    assert found.ici_bytes == pytest.approx(2 * 7 / 8 * MIB)
    assert found.dcn_bytes == pytest.approx(2 * 1 / 2 * MIB / 8)
    assert found.dcn_seconds == pytest.approx(MIB / 8 / (V5E.network / 8))
    assert found.exposed == pytest.approx(found.ici_seconds + found.dcn_seconds)


SEND = """%send = (f32[128,256]{{1,0:T(8,128)}}, u32[], token[]) send(%p, %a), channel_id=2, is_host_transfer=true, \
frontend_attributes={{_xla_host_transfer_rendezvous="r_0",_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}
  %recv = (f32[128,256]{{1,0:T(8,128)}}, u32[], token[]) recv(%a), channel_id=1, is_host_transfer=true, \
frontend_attributes={{_xla_host_transfer_rendezvous="r_0",_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}
  %x = f32[8] fusion(%p), kind=kLoop, calls=%f, {back}
  %sd = token[] send-done(%send), channel_id=2
  %rd = (f32[128,256]{{1,0:T(8,128)}}, token[]) recv-done(%recv), channel_id=1"""


@pytest.mark.parametrize("target", ['"{1,2}x{0:7}"', "{{100000,200000},{100001,200001}}"])
@pytest.mark.parametrize(
    ("kind", "array", "sent"),
    [
        ("ALL_REDUCE", MIB // 8, MIB / 8),
        ("ALL_GATHER", MIB // 4, MIB / 8),
        ("ALL_TO_ALL", MIB // 8, MIB / 16),
    ],
)
def test_transfers_between_slices_are_found_in_the_program_of_one(target, kind, array, sent):
    text = program(SEND.format(target=target, kind=kind, back=BACK))
    (found,) = collectives(text, devices(2))
    assert (found.kind, found.bytes) == (kind.lower().replace("_", "-"), array)
    assert (found.group, found.slices) == (2, 2)
    assert (found.ici_bytes, found.dcn_bytes) == (0, pytest.approx(sent))
    assert found.exposed == pytest.approx(found.dcn_seconds - 5e-6)


START = "%s = (f32[128,256], f32[1024,256]) all-gather-start(%p), replica_groups={}"
DONE = "%d = f32[1024,256]{1,0:T(8,128)} all-gather-done(%s)"
WORK = f"%x = f32[8] fusion(%p), kind=kLoop, calls=%f, {BACK}"


def test_work_between_start_and_end_hides_a_collective():
    (found,) = collectives(program(WORK, START, DONE), devices())
    assert (found.bytes, found.exposed) == (MIB, pytest.approx(found.ici_seconds))
    (found,) = collectives(program(START, WORK, DONE), devices())
    assert found.exposed == pytest.approx(found.ici_seconds - 5e-6)
    (found,) = collectives(program(START, *(5 * [WORK]), DONE), devices())
    assert found.exposed == 0


def test_work_hides_a_second_of_the_network_only_once():
    other = [line.replace("%s", "%s2").replace("%d", "%d2") for line in (START, DONE)]
    first, second = collectives(program(START, other[0], WORK, other[1], DONE), devices())
    together = first.ici_seconds + second.ici_seconds
    assert first.exposed + second.exposed == pytest.approx(together - 5e-6)


FUSED = """
%begin (q: f32[128,256]) -> (f32[128,256], f32[1024,256]) {
  %g.1 = f32[1024,256]{1,0} all-gather(%q), channel_id=7, replica_groups={}, frontend_attributes={chain_id="0"}
  ROOT %c.1 = (f32[128,256], f32[1024,256]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%carry (q.1: f32[128,256]) -> f32[8] {
  %g.2 = f32[1024,256]{1,0} all-gather(%q.1), channel_id=7, replica_groups={}, frontend_attributes={chain_id="0"}
  ROOT %t.2 = f32[8] tanh(%q.1)
}

%finish (q.2: f32[128,256]) -> f32[1024,256] {
  %g.3 = f32[1024,256]{1,0} all-gather(%q.2), channel_id=7, replica_groups={}, frontend_attributes={chain_id="0"}
  ROOT %c.3 = f32[1024,256] custom-call(%g.3), custom_call_target="AsyncCollectiveDone"
}

%scatter (q.3: f32[1024,256]) -> f32[128,256] {
  %r.4 = f32[1024,256]{1,0} all-reduce(%q.3), channel_id=7, replica_groups={}, to_apply=%add
  ROOT %d.4 = f32[128,256] dynamic-slice(%r.4, %i, %i), dynamic_slice_sizes={128,256}
}
"""


def test_a_collective_that_fusions_carry_along_counts_once():
    begin = "%a = (f32[128,256], f32[1024,256]) fusion(%p), kind=kCustom, calls=%begin"
    carry = f"%b = f32[8] fusion(%a), kind=kOutput, calls=%carry, {BACK}"
    finish = "%d = f32[1024,256] fusion(%b), kind=kCustom, calls=%finish"
    (found,) = collectives(program(begin, carry, finish, others=FUSED), devices())
    assert (found.kind, found.bytes) == ("all-gather", MIB)
    assert found.exposed == pytest.approx(found.ici_seconds - 5e-6)
    other = "%e = f32[128,256] fusion(%p), kind=kCustom, calls=%scatter"  # its channel is the same
    both = collectives(program(begin, carry, other, finish, others=FUSED), devices())
    assert [each.kind for each in both] == ["all-gather", "reduce-scatter"]


def test_a_sum_of_which_its_fusion_keeps_a_slice_is_a_reduce_scatter():
    text = program("%b = f32[128,256] fusion(%p), kind=kCustom, calls=%scatter", others=FUSED)
    (found,) = collectives(text, devices())
    assert (found.kind, found.bytes, found.sliced) == ("reduce-scatter", MIB, 0)
    assert found.ici_bytes == pytest.approx(7 / 8 * MIB)


def test_a_sum_that_only_slices_are_taken_of_is_told():
    reduce = collective("all-reduce")
    cut = "%y = f32[128,256] dynamic-slice(%c, %i, %i), dynamic_slice_sizes={128,256}"
    (found,) = collectives(program(reduce, cut), devices())
    assert found.sliced == MIB
    (found,) = collectives(program(reduce, cut, "%z = f32[1024,256] tanh(%c)"), devices())
    assert found.sliced == 0


def test_of_several_arrays_those_that_only_slices_are_taken_of_count():
    shape = "(f32[1024,256]{1,0}, f32[512,256]{1,0})"
    elements = [
        f"%e{i} = f32[{rows},256] get-tuple-element(%c), index={i}"
        for i, rows in enumerate((1024, 512))
    ]
    cut = "%y = f32[64,256] dynamic-slice(%e1, %i, %i), dynamic_slice_sizes={64,256}"
    used = "%z = f32[1024,256] tanh(%e0)"
    text = program(collective("all-reduce", shape=shape), *elements, cut, used)
    (found,) = collectives(text, devices())
    assert (found.bytes, found.sliced) == (3 * MIB // 2, MIB // 2)


def test_an_asynchronous_wrapper_is_looked_into():
    start = "%s = ((f32[1024,256]), f32[1024,256]) async-start(%p), calls=%scatter"
    done = "%d = f32[1024,256] async-done(%u)"
    update = "%u = ((f32[1024,256]), f32[1024,256]) async-update(%s)"
    (found,) = collectives(program(start, WORK, update, done, others=FUSED), devices())
    assert found.kind == "all-reduce"
    assert found.exposed == pytest.approx(found.ici_seconds - 5e-6)


def test_what_is_not_understood_is_an_error():
    with pytest.raises(ValueError, match="in an unknown notation"):
        collectives(program(collective("all-gather", "groups=all")), devices())
    permuted = "replica_groups=mesh['a'=2,'b'=4, device_ids=([4,2]T(1,0))] {'a'}"
    with pytest.raises(ValueError, match="in an unknown notation"):
        collectives(program(collective("all-gather", permuted)), devices())
    for target in ('"{1,3}x{0:7}"', "{{100000,300000}}", "all"):
        text = program(SEND.format(target=target, kind="ALL_REDUCE", back=BACK))
        with pytest.raises(ValueError, match="a transfer between unknown devices"):
            collectives(text, devices(2))
    with pytest.raises(ValueError, match="a program of 4 partitions is given 8 devices"):
        collectives(program(partitions=4), devices())


COMPILED = """
import json
import jax, jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ldm_jax.planning.aot import topology
from ldm_jax.planning.collectives import collectives

LAYERS, WIDTH = 4, 1024

def show(name, devices, spec):
    mesh = Mesh(np.array(devices), "x")
    placed, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (spec, ("x",)))

    def keep(x):
        return jax.lax.with_sharding_constraint(x, rows)

    def layer(x, w):
        return keep(x + keep(jnp.tanh(x @ w[0])) @ w[1]), None

    def loss(params, x):
        return (jax.lax.scan(layer, x, params)[0].astype(jnp.float32) ** 2).mean()

    def step(params, x):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, x))

    shapes = (LAYERS, WIDTH, 4 * WIDTH), (LAYERS, 4 * WIDTH, WIDTH)
    params = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed) for shape in shapes)
    x = jax.ShapeDtypeStruct((512, WIDTH), jnp.bfloat16, sharding=rows)
    text = jax.jit(step, out_shardings=(placed, placed)).lower(params, x).compile().as_text()
    print(json.dumps([name, [each._asdict() for each in collectives(text, devices)]]))

show("fsdp", topology("v5e:2x4"), (None, "x"))
show("columns", topology("v5e:2x4"), (None, None, "x"))
show("data", topology("v5e:2x4"), ())
show("slices", topology("v6e:2x4", num_slices=2), ())
"""
PARAMETERS = 2 * 4 * 1024 * 4096 * 2  # bytes of all layers


@pytest.fixture(scope="module")
def compiled():
    found = dict(json.loads(row) for row in printed(COMPILED))
    return {name: [SimpleNamespace(**row) for row in rows] for name, rows in found.items()}


def moved(rows, kind, key="ici_bytes"):
    return sum(row.times * getattr(row, key) for row in rows if row.kind == kind)


def test_fully_sharded_parameters_are_gathered_twice_and_their_gradient_scattered_once(compiled):
    """ZeRO-3 (Rajbhandari et al. 2020, arXiv:1910.02054, section 7.1)."""
    rows = compiled["fsdp"]
    assert {row.kind for row in rows} == {"all-gather", "reduce-scatter"}
    assert moved(rows, "all-gather") == pytest.approx(2 * 7 / 8 * PARAMETERS)
    assert moved(rows, "reduce-scatter") == pytest.approx(7 / 8 * PARAMETERS)
    assert all(0 <= row.exposed <= row.ici_seconds for row in rows)


def test_a_gradient_summed_on_every_device_and_then_sliced_is_told(compiled):
    """So the compiler does where the columns of the second matrix are divided; it sends twice the bytes."""
    assert not any(row.sliced for row in compiled["fsdp"])
    (row,) = (row for row in compiled["columns"] if row.kind == "all-reduce")
    assert row.sliced == row.bytes
    assert row.times * row.ici_bytes == pytest.approx(2 * 7 / 8 * PARAMETERS / 2)


def test_data_parallel_gradients_are_summed_once(compiled):
    rows = compiled["data"]
    assert {(row.kind, row.group) for row in rows} == {("all-reduce", 8)}
    assert moved(rows, "all-reduce") == pytest.approx(2 * 7 / 8 * PARAMETERS)


def test_between_slices_go_the_parts_that_chips_have_summed(compiled):
    """Within a slice they are summed into parts, or by older compilers whole, at twice the bytes, and then sliced."""
    rows = compiled["slices"]
    assert all(
        row.sliced == row.bytes for row in rows if row.kind == "all-reduce" and row.slices == 1
    )
    summed = moved(rows, "reduce-scatter") + moved(rows, "all-reduce") / 2
    assert summed == pytest.approx(7 / 8 * PARAMETERS)
    assert moved(rows, "all-gather") == pytest.approx(7 / 8 * PARAMETERS)
    assert moved(rows, "all-reduce", "dcn_bytes") == pytest.approx(2 * 1 / 2 * PARAMETERS / 8)
    assert {row.slices for row in rows if row.dcn_bytes} == {2}
