"""Training: the state, the step, the loop and the optimiser, which need nothing but JAX and optax.

What keeps a run alive and tells of it stands beside them, and imports Orbax and clu:
`ldm_jax.training.checkpoints` and `ldm_jax.training.hooks`.
"""

from ldm_jax.training.goodput import Stopwatch
from ldm_jax.training.loop import Every, Hook, Preempted, Tick, TrainingError, fit, prefetch
from ldm_jax.training.optimizer import OptimizerConfig, make_optimizer
from ldm_jax.training.state import State, abstract_state, init_state
from ldm_jax.training.step import jit_step, make_step

__all__ = [
    "Every",
    "Hook",
    "OptimizerConfig",
    "Preempted",
    "State",
    "Stopwatch",
    "Tick",
    "TrainingError",
    "abstract_state",
    "fit",
    "init_state",
    "jit_step",
    "make_optimizer",
    "make_step",
    "prefetch",
]
