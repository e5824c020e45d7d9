"""One loop for all of the small networks: AdamW, a short warm-up, then a cosine to zero."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec

from ldm_jax.parallel.mesh import MeshConfig, make_mesh
from ldm_jax.types import Params

Loss = Callable[[Params, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def optimise(
    name: str,
    loss: Loss,
    params: Params,
    batches: Iterator[Any],
    save: Callable[[Params], None],
    *,
    steps: int,
    learning_rate: float,
) -> None:
    """Minimises `loss(params, batch, key) -> (value, scalars)`, prints the scalars' means and saves ten times."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(200, steps // 10), steps)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-4)
    )
    mesh = make_mesh(MeshConfig())
    everywhere, split = (
        jax.sharding.NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data"))
    )

    @jax.jit
    def step(params: Params, opt_state: Any, batch: Any, number: int) -> tuple[Params, Any, dict]:
        key = jax.random.fold_in(jax.random.key(0), number)
        gradient, scalars = jax.grad(loss, has_aux=True)(params, batch, key)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, scalars

    params, opt_state = jax.device_put((params, tx.init(params)), everywhere)
    seen, begin = [], time.perf_counter()
    for number in range(1, steps + 1):
        batch = jax.device_put(next(batches), split)
        params, opt_state, scalars = step(params, opt_state, batch, number)
        seen.append(scalars)
        if number % max(1, steps // 50) == 0:
            means = {k: np.mean([float(s[k]) for s in seen]) for k in scalars}
            text = "  ".join(f"{k} {v:.4f}" for k, v in means.items())
            print(
                f"{name} {number}/{steps}  {text}  {time.perf_counter() - begin:.0f} s", flush=True
            )
            seen = []
        if number % max(1, steps // 10) == 0:
            save(params)
