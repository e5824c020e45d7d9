"""One optimisation step as a pure function."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt32

from ldm_jax.parallel import jit
from ldm_jax.training.state import State
from ldm_jax.types import Batch, Keys, Params

Loss = Callable[[Params, Params, Params, Batch, Keys], Float[Array, " B"]]
Scalars = dict[str, Float[Array, ""]]
Step = Callable[[State, Params, Batch], tuple[State, Scalars]]

# The half-life of the average is at most this share of the examples seen.
EMA_SHARE = 0.1


def make_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    ema: float | int,
    accumulate: int = 1,
) -> Step:
    """Makes `step(state, frozen, batch) -> (state, scalars)`; jit it, and donate the state.

    Args:
      loss: `loss(params, ema, frozen, batch, keys) -> [B]`, one number an example.
      tx: the optimiser.
      key: the randomness of the whole run. An example's key is `fold_in(key, its index)`, so that
        its noise depends neither on the batch it is in nor on the device it is on.
      ema: half-life of the average of the parameters, in examples; 0 where the state keeps none.
      accumulate: the number of parts that a batch is taken in, to save memory. The gradient is
        that of the whole batch whatever it is.

    The loss is averaged with `batch.weight`, so rows of weight 0 change nothing; a batch of such
    rows alone has no mean and gives NaN. `state.examples` counts all rows, as positions of the
    data. `frozen` holds parameters that are not trained; they are an argument because what a
    function closes over is compiled into the program. Raises ValueError where the state keeps an
    average and `ema` is 0, or the other way round.
    """

    def mean_loss(params: Params, state: State, frozen: Params, part: Batch, total: Any) -> Any:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, part.index)
        losses = loss(params, state.average, frozen, part, keys)
        return jnp.sum(part.weight * losses.astype(jnp.float32)) / total

    def loss_and_gradient(state: State, frozen: Params, batch: Batch) -> tuple[Any, Params]:
        total = jnp.sum(batch.weight)

        def of(part: Batch) -> tuple[Any, Params]:
            return jax.value_and_grad(mean_loss)(state.params, state, frozen, part, total)

        if accumulate == 1:
            return of(batch)
        zeros = jax.tree.map(jnp.zeros_like, (total, state.params))
        add = lambda sums, part: (jax.tree.map(jnp.add, sums, of(part)), None)  # noqa: E731
        return jax.lax.scan(add, zeros, split(batch, accumulate))[0]

    def step(state: State, frozen: Params, batch: Batch) -> tuple[State, Scalars]:
        value, gradient = loss_and_gradient(state, frozen, batch)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        examples = state.examples + jnp.uint32(len(batch.weight))
        average = _average(state.ema, params, ema, examples, len(batch.weight))
        # Norms of the parameters or their updates would read all of them once more.
        scalars = {"loss": value, "grad_norm": optax.tree.norm(gradient)}
        return State(state.step + 1, examples, params, average, opt_state), scalars

    return step


def jit_step(step: Step, state: State, mesh: Mesh) -> Step:
    """Compiles `step` once for a run: the new state lies where `state` does, and takes its memory.

    `state` may be abstract. Without its shardings the compiler may place the new state otherwise, and then the second
    step is compiled again.
    """
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jit(step, mesh, donate_argnums=0, out_shardings=(placed, None))


def ema_rate(
    half_life: float | int, examples: UInt32[Array, ""], batch_size: int
) -> Float[Array, ""]:
    """The share of the new parameters in the average: 1 - 2^(-batch_size / h).

    h = min(half_life, EMA_SHARE * examples), with `examples` seen after this batch. So the early
    average is a power-function one (Karras et al. 2024, section 3.1): the initial parameters fade
    from it as examples^(-ln 2 / EMA_SHARE), with the power -6.9.
    """
    h = jnp.minimum(half_life, EMA_SHARE * examples.astype(jnp.float32))
    return -jnp.expm1(-math.log(2.0) * batch_size / h)


def split(batch: Batch, parts: int) -> Batch:
    """Deals the rows of a batch to `parts`, as a new leading axis.

    Rows are dealt in turn, so that every part is spread over the same devices as the whole.
    """
    size = len(batch.weight)
    if size % parts:
        raise ValueError(f"A batch of {size} does not divide into accumulate={parts} parts.")
    return jax.tree.map(lambda x: rearrange(x, "(b parts) ... -> parts b ...", parts=parts), batch)


def _average(
    ema: Params | None,
    params: Params,
    half_life: float | int,
    examples: UInt32[Array, ""],
    batch_size: int,
) -> Params | None:
    if (ema is None) != (half_life == 0):
        raise ValueError(
            f"ema is {half_life}, and the state keeps {'no' if ema is None else 'an'} average"
        )
    if ema is None:
        return None
    rate = ema_rate(half_life, examples, batch_size)
    return jax.tree.map(lambda old, new: old + rate * (new - old), ema, params)
