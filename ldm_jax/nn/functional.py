"""The one door between Flax NNX modules and the plain JAX that everything else is written in."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ldm_jax.types import Params


class Functional(NamedTuple):
    """A network as two pure functions on a nested dict of arrays."""

    init: Callable[[jax.Array], Params]
    apply: Callable[..., Any]


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Turns a module's constructor into `(init, apply)`; nothing is materialised on the way.

    `init(key)` makes the parameters and may be jitted with `out_shardings`, so that they are born sharded.
    `apply(params, *args, method="__call__", **kwargs)` calls one method of the module and is pure.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key: jax.Array) -> Params:
        # XLA's own generator: a threefry draw for every parameter takes a minute to compile on a CPU.
        seed = jnp.resize(jax.random.key_data(key), 4)
        key = jax.random.wrap_key_data(seed, impl="unsafe_rbg")
        return _rekey(nnx.to_pure_dict(nnx.split(make(nnx.Rngs(key)))[1]), str)

    def apply(params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        state = nnx.State(jax.tree.map(nnx.Param, _rekey(params, _as_index)))
        return getattr(nnx.merge(graph, state), method)(*args, **kwargs)

    return Functional(init, apply)


def _rekey(tree: Params, rename: Callable[[Any], Any]) -> Params:
    """NNX numbers the members of a list by ints; checkpoints and sorted pytrees want one type of key."""
    if not isinstance(tree, dict):
        return tree
    return {rename(name): _rekey(branch, rename) for name, branch in tree.items()}


def _as_index(name: str) -> str | int:
    return int(name) if name.isdigit() else name
