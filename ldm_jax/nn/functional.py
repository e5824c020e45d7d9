"""The one door between Flax NNX modules and the plain JAX that everything else is written in."""

import itertools
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


class Keys(nnx.Rngs, pytree=False):
    """The keys that `nnx.Rngs(key)` gives parameters, counted in Python: its count is an array, and slow to trace."""

    def __init__(self, key: jax.Array) -> None:
        self._key, self._drawn = key, itertools.count()

    def params(self) -> jax.Array:
        """The next key."""
        return jax.random.fold_in(self._key, next(self._drawn))


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Turns a module's constructor into `(init, apply)`; nothing is materialised on the way.

    `init(key)` makes the parameters and may be jitted with `out_shardings`, so that they are born sharded.
    `apply(params, *args, method="__call__", **kwargs)` calls one method of the module and is pure.
    """
    graph: Any = None

    @jax.jit
    def init(key: jax.Array) -> Params:
        nonlocal graph
        # XLA's own generator: a threefry draw for every parameter takes a minute to compile on a CPU.
        seed = jnp.resize(jax.random.key_data(key), 4)
        key = jax.random.wrap_key_data(seed, impl="unsafe_rbg")
        graph, state = nnx.split(make(Keys(key)))
        return _rekey(nnx.to_pure_dict(state), str)

    jax.eval_shape(init, jax.random.key(0))  # traced here once for all, which gives `graph`

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
