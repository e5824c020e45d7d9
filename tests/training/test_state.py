import jax
import numpy as np
import toy

from ldm_jax.parallel import MeshConfig, make_mesh
from ldm_jax.training import abstract_state, init_state


def test_a_state_is_born_as_its_abstract_form_says():
    place = toy.place(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
    tx = toy.optimizer()
    state = init_state(toy.init, tx, jax.random.key(0), place)
    abstract = abstract_state(toy.init, tx, place)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for leaf, plan in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (plan.shape, plan.dtype)
        assert leaf.sharding.is_equivalent_to(plan.sharding, leaf.ndim)


def test_each_device_holds_its_part_of_parameters_average_and_moments():
    place = toy.place(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
    state = init_state(toy.init, toy.optimizer(), jax.random.key(0), place)
    kernels = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (8, 4)]
    assert len(kernels) == 4
    for kernel in kernels:
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 2)}


def test_a_fresh_state_does_not_depend_on_the_mesh_and_averages_its_parameters():
    whole = init_state(toy.init, toy.optimizer(), jax.random.key(0))
    place = toy.place(make_mesh(MeshConfig(data=2, fsdp=4)))
    parts = init_state(toy.init, toy.optimizer(), jax.random.key(0), place)
    jax.tree.map(np.testing.assert_array_equal, toy.host(whole), toy.host(parts))
    jax.tree.map(np.testing.assert_array_equal, whole.params, whole.ema)
    assert int(whole.step) == int(whole.examples) == 0


def test_a_fresh_state_can_be_donated():
    state = init_state(toy.init, toy.optimizer(), jax.random.key(0))
    jax.jit(lambda state: state._replace(step=state.step + 1), donate_argnums=0)(state)
    assert state.step.is_deleted()
