"""What training carries from one step to the next, and how it comes into being."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Int32, UInt32

from ldm_jax.types import Params

Init = Callable[[jax.Array], Params]
Place = Callable[[Any], Any]


class State(NamedTuple):
    """Everything that a run needs to go on, and all that a checkpoint holds.

    `examples` counts the positions of the data's global order that training has consumed: the data
    position, from which the loader goes on, and the clock of every schedule and period. `ema` is
    the average of the parameters, or None where none is kept.
    """

    step: Int32[Array, ""]
    examples: UInt32[Array, ""]
    params: Params
    ema: Params | None
    opt_state: Any

    @property
    def average(self) -> Params:
        """`ema`, or the parameters themselves where no average is kept."""
        return self.params if self.ema is None else self.ema


def abstract_state(
    init: Init, tx: optax.GradientTransformation, place: Place | None = None, *, ema: bool = True
) -> State:
    """The names, shapes, dtypes and shardings of a state; nothing is allocated.

    `init(key)` makes the parameters. `place` maps a tree of shapes to a tree of shardings, e.g.
    `functools.partial(shardings, table=..., rules=..., mesh=...)`; without it all is on one device.
    `ema` says whether an average of the parameters is kept.
    """
    shapes = jax.eval_shape(lambda: _create(init, tx, ema, jax.random.key(0)))
    placed = (place or _on_one_device)(shapes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        placed,
    )


def init_state(
    init: Init,
    tx: optax.GradientTransformation,
    key: jax.Array,
    place: Place | None = None,
    *,
    ema: bool = True,
) -> State:
    """A fresh state, born sharded: no device or host ever holds more than its part.

    The arguments are those of `abstract_state`.
    """
    return jit_init(init, tx, place, ema=ema)(key)


def jit_init(
    init: Init, tx: optax.GradientTransformation, place: Place | None = None, *, ema: bool = True
) -> Callable[[jax.Array], State]:
    """The program of `init_state`, from its key."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(init, tx, place, ema=ema))
    return jax.jit(functools.partial(_create, init, tx, ema), out_shardings=placed)


def _create(init: Init, tx: optax.GradientTransformation, ema: bool, key: jax.Array) -> State:
    params = init(key)
    return State(
        step=jnp.zeros((), jnp.int32),
        examples=jnp.zeros((), jnp.uint32),
        params=params,
        ema=params if ema else None,
        opt_state=tx.init(params),
    )


def _on_one_device(tree: Any) -> Any:
    return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), tree)
