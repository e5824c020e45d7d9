import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from ldm_jax.parallel import (
    REPLICATED,
    MeshConfig,
    device_bytes,
    leaf_name,
    make_mesh,
    shardings,
)

TABLE = (
    (r"up/kernel", ("embed", "ffn")),
    (r"down/kernel", ("ffn", "embed")),
    (r"bias|norm/.*", REPLICATED),
)
RULES = (("ffn", "tensor"), ("embed", "fsdp"), ("ffn", "fsdp"))


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def params(rows=8):
    return {
        "blocks": {
            "up": {"kernel": jnp.zeros((rows, 16)), "bias": jnp.zeros((16,))},
            "down": {"kernel": jnp.zeros((16, rows)), "bias": jnp.zeros((rows,))},
        },
        "norm": {"scale": jnp.zeros((3,))},
    }


def specs(placed):
    leaves = jax.tree_util.tree_leaves_with_path(placed)
    return {leaf_name(path): sharding.spec for path, sharding in leaves}


def test_the_first_row_that_matches_the_path_places_a_leaf(mesh):
    assert specs(shardings(params(), TABLE, RULES, mesh)) == {
        "blocks/up/kernel": P("fsdp", "tensor"),
        "blocks/up/bias": P(None),
        "blocks/down/kernel": P("tensor", "fsdp"),
        "blocks/down/bias": P(None),
        "norm/scale": P(None),
    }
    first = ((r".*", REPLICATED), *TABLE)
    assert {
        axis for spec in specs(shardings(params(), first, RULES, mesh)).values() for axis in spec
    } == {None}


def test_the_same_table_places_the_moments_of_the_optimiser(mesh):
    opt_state = jax.eval_shape(optax.adamw(1e-3).init, params())
    placed = specs(shardings(opt_state, TABLE, RULES, mesh))
    for name, spec in specs(shardings(params(), TABLE, RULES, mesh)).items():
        assert placed[f"0/mu/{name}"] == placed[f"0/nu/{name}"] == spec
    assert placed["0/count"] == P()


def test_a_pattern_matches_whole_names_at_the_end_of_a_path(mesh):
    tree = {"setup": {"kernel": jnp.zeros((8, 16))}, "up": {"kernel": jnp.zeros((8, 16))}}
    table = ((r"up/kernel", ("embed", "ffn")), (r".*", REPLICATED))
    placed = specs(shardings(tree, table, RULES, mesh))
    assert placed == {"setup/kernel": P(None, None), "up/kernel": P("fsdp", "tensor")}


def test_a_row_holds_for_the_last_dims(mesh):
    stacked = {"up": {"kernel": jnp.zeros((28, 8, 16))}}
    assert specs(shardings(stacked, TABLE, RULES, mesh)) == {"up/kernel": P(None, "fsdp", "tensor")}


def test_what_a_rule_does_not_divide_the_next_one_may(mesh):
    only_fsdp = make_mesh(MeshConfig(data=1, fsdp=8))
    odd = {"up": {"kernel": jnp.zeros((7, 16))}, "down": {"kernel": jnp.zeros((15, 7))}}
    assert specs(shardings(odd, TABLE, RULES, only_fsdp)) == {
        "up/kernel": P(None, "fsdp"),
        "down/kernel": P(None, None),
    }


def test_what_a_device_holds_is_counted(mesh):
    def bytes_of(rules):
        placed = shardings(params(), TABLE, rules, mesh)
        return device_bytes(
            jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params(), placed
            )
        )

    kernels, rest = 2 * 8 * 16 * 4, (16 + 8 + 3) * 4
    assert bytes_of(()) == kernels + rest
    assert bytes_of(RULES) == kernels // 4 + rest
    assert device_bytes(jax.device_put(params(), jax.devices()[0])) == kernels + rest


@pytest.mark.parametrize(
    ("table", "rules", "message"),
    [
        (TABLE[:1], RULES[:2], "no row of the table of axes matches blocks/down/bias"),
        (((r".*", ("embed", "ffn", "x")),), RULES, r"names 3 dims .* and blocks/\w+/\w+ has the"),
        (TABLE, (("embed", "fdsp"),), "no rule embed=fdsp: dims are called embed, ffn, and the"),
        (TABLE, (("embbed", "fsdp"),), "no rule embbed=fsdp"),
    ],
)
def test_what_does_not_fit_is_said(mesh, table, rules, message):
    with pytest.raises(ValueError, match=message):
        shardings(params(), table, rules, mesh)
