import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from ldm_jax.parallel import REPLICATED, MeshConfig, leaf_name, make_mesh, shardings

TABLE = (
    (r"up/kernel", ("embed", "ffn")),
    (r"(up|down)/bias", (None,)),
    (r"down/kernel", ("ffn", "embed")),
    (r"norm/.*", REPLICATED),
)
RULES = {"embed": "fsdp", "ffn": "tensor"}


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
        "norm/scale": P(),
    }
    first = ((r".*", REPLICATED), *TABLE)
    assert set(specs(shardings(params(), first, RULES, mesh)).values()) == {P()}


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
    assert placed == {"setup/kernel": P(), "up/kernel": P("fsdp", "tensor")}


def test_one_dimension_may_lie_over_two_axes_of_the_mesh(mesh):
    placed = shardings({"w": jnp.zeros((8, 3))}, [("w", ("embed", None))], RULES, mesh)
    assert placed["w"].shard_shape((8, 3)) == (4, 3)
    both = {"embed": ("fsdp", "tensor")}
    placed = shardings({"w": jnp.zeros((8, 3))}, [("w", ("embed", None))], both, mesh)
    assert placed["w"].shard_shape((8, 3)) == (2, 3)


def test_rules_that_are_all_none_hold_odd_shapes_whole_on_every_device(mesh):
    placed = shardings(params(rows=5), TABLE, {"embed": None, "ffn": None}, mesh)
    on_devices = jax.device_put(params(rows=5), placed)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(on_devices))


@pytest.mark.parametrize(
    ("table", "rules", "message"),
    [
        (TABLE[:2], RULES, r"No row .* blocks/down/kernel with the shape \(16, 8\)"),
        ([(".*", ("embed",))], RULES, r"names 1 dimensions .* blocks/down/kernel"),
        ([("kernel", ("heads", None)), (".*", None)], RULES, r"'heads' .* map \['embed', 'ffn'\]"),
        (TABLE, {"embed": "pipeline", "ffn": None}, r"names \['pipeline'\]"),
        (TABLE, {"embed": "fsdp", "ffn": "fsdp"}, r"two dimensions of blocks/down/kernel"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_with_the_path(mesh, table, rules, message):
    with pytest.raises(ValueError, match=message):
        shardings(params(), table, rules, mesh)


def test_a_dimension_that_does_not_divide_is_refused_with_its_size(mesh):
    with pytest.raises(ValueError, match=r"Dimension 1 of blocks/down/kernel \(16, 5\) .* by 2"):
        shardings(params(rows=5), TABLE, RULES, mesh)
