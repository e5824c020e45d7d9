"""Objectives of training, a row each; `config.objective.name` chooses one."""

from ldm_jax.tasks.objective import Difference as Difference
from ldm_jax.tasks.objective import Objective as Objective
from ldm_jax.tasks.pretraining import Pretraining

OBJECTIVES: dict[str, type[Objective]] = {"pretraining": Pretraining}
