import jax
import jax.numpy as jnp
import pytest

from ldm_jax.parallel import MeshConfig, compiler_options, jit, make_mesh
from ldm_jax.planning.aot import topology


def test_the_mesh_is_in_force_where_a_program_is_traced_and_not_outside():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    seen = []
    double = jit(lambda x: seen.append(jax.sharding.get_abstract_mesh()) or 2 * x, mesh)
    assert float(double(jnp.float32(3.0))) == float(double(jnp.float32(3.0))) == 6.0
    assert seen == [mesh.abstract_mesh]
    assert jax.sharding.get_abstract_mesh().empty


def test_options_of_jit_are_passed_on():
    step = jit(lambda x: x + 1, make_mesh(MeshConfig()), donate_argnums=0)
    given = jnp.zeros(8)
    step(given)
    assert given.is_deleted()


def test_programs_on_cpus_have_the_compilers_own_options():
    assert compiler_options(make_mesh(MeshConfig())) == {}


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_programs_on_tpus_have_options(name):
    pytest.importorskip("libtpu")
    assert compiler_options(make_mesh(MeshConfig(), topology(name)))
