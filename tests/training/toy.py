"""A regression whose every part is known, as a library for tests and as a run that can be killed."""

import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.parallel import REPLICATED, MeshConfig, make_mesh, shardings
from ldm_jax.training import (
    OptimizerConfig,
    State,
    Tick,
    abstract_state,
    fit,
    init_state,
    jit_step,
    make_optimizer,
    make_step,
    prefetch,
)
from ldm_jax.training.checkpoints import Checkpoints
from ldm_jax.training.saving import Save, Saver
from ldm_jax.types import Batch

WIDTH = 8
TABLE = ((r"kernel", ("embed", "out")), (r".*", REPLICATED))
RULES = (("embed", "fsdp"), ("out", "tensor"))


def init(key, ballast=0):
    """One linear map; `ballast` adds parameters, so that saving them takes a while."""
    params = {"dense": {"kernel": jax.random.normal(key, (WIDTH, 4)), "bias": jnp.zeros((4,))}}
    return params | ({"ballast": jax.random.normal(key, (ballast, 8))} if ballast else {})


def loss(params, ema, frozen, batch, keys):
    """Squared error of the linear map from noisy inputs to what the frozen map makes of them."""
    x = batch.latents[:, 0, 0]
    noise = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
    dense = params["dense"]
    found = jnp.einsum("bi,io->bo", x + 0.1 * noise, dense["kernel"]) + dense["bias"][None]
    return jnp.mean((found - jnp.einsum("bi,io->bo", x, frozen)) ** 2, axis=1)


def frozen():
    return jnp.linspace(-1.0, 1.0, WIDTH * 4).reshape(WIDTH, 4)


def batch(start, size=8):
    """The examples at the positions start, start + 1, ..., each a function of its position."""
    index = np.arange(start, start + size, dtype=np.uint32)
    latents = np.stack([np.random.default_rng(i).normal(size=(1, 1, WIDTH)) for i in index])
    return Batch(
        latents=latents.astype(np.float32),
        cond=np.zeros((size, 1), np.int32),
        weight=np.ones(size, np.float32),
        index=index,
    )


def batches(start, size=8, pause=0.0):
    while True:
        time.sleep(pause)
        yield batch(start, size)
        start += size


def optimizer(size=8):
    config = OptimizerConfig(learning_rate=0.01, warmup_examples=64)
    return make_optimizer(config, batch_size=size, examples=0)


def place(mesh):
    return partial(shardings, table=TABLE, rules=RULES, mesh=mesh)


class Run:
    """All that a run is made of, on one mesh; `go` starts it or goes on with it."""

    def __init__(self, directory, mesh=None, ballast=0, keep=3, period=40, pause=0.0):
        self.mesh = mesh or make_mesh(MeshConfig(data=1), jax.devices()[:1])
        self.init, self.tx, self.pause = partial(init, ballast=ballast), optimizer(), pause
        self.abstract = abstract_state(self.init, self.tx, place(self.mesh))
        self.checkpoints, self.period = Checkpoints(Path(directory) / "checkpoints", keep), period
        step = make_step(loss, self.tx, jax.random.key(1), ema=100)
        self.jitted = jit_step(step, self.abstract, self.mesh)

    def state(self):
        if self.checkpoints.latest() is not None:
            return self.checkpoints.restore(self.abstract)
        return init_state(self.init, self.tx, jax.random.key(0), place(self.mesh))

    def step(self, state, batch):
        return self.jitted(state, frozen(), batch)

    def go(self, until, hooks=None):
        state = self.state()
        source = prefetch(batches(int(state.examples), pause=self.pause), self.mesh)
        hooks = [Save(Saver(self.checkpoints), self.period)] if hooks is None else hooks
        return fit(self.step, state, source, until=until, hooks=hooks)


def ticks(losses, size=8, before=0, last=True, **scalars):
    """What hooks would be shown of steps with these losses."""
    for i, loss in enumerate(losses):
        here = before + i * size
        yield Tick(
            step=here // size + 1,
            before=here,
            examples=here + size,
            last=last and i == len(losses) - 1,
            state=State(jnp.int32(0), jnp.uint32(0), {"w": jnp.zeros((2, 3))}, {}, ()),
            scalars={"loss": jnp.float32(loss)} | {k: jnp.float32(v) for k, v in scalars.items()},
            batch=batch(here, size),
        )


def host(state):
    """A copy on the host: on a CPU `device_get` alone shows the device's own memory."""
    return jax.tree.map(np.array, jax.device_get(state))


if __name__ == "__main__":
    directory, until = Path(sys.argv[1]), int(sys.argv[2])
    state = Run(directory, ballast=200_000, period=80, pause=0.01).go(until)
    np.savez(directory / "final.npz", *jax.tree.leaves(host(state)))
