"""The validation loss of a run, by noise level."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from ldm_jax import diffusion
from ldm_jax.data.loader import fixed_batch
from ldm_jax.evals.evaluator import proceed
from ldm_jax.parallel import jit, put_same, replicated
from ldm_jax.runs.run import Run
from ldm_jax.types import Batch, Params

Validate = Callable[..., dict[str, float]]


def make_validation(run: Run) -> Validate:
    """Makes `validate(params, frozen, pause=...) -> {noise level: loss}`, on fixed records and noise.

    It returns {} where `eval.validation` is 0. What `pause` raises after a batch ends it.
    """
    if not run.config.eval.validation:
        return lambda params, frozen, pause=proceed: {}
    parts, count = _batches(run)
    levels = run.config.eval.levels
    loss = diffusion.make_validation_loss(
        run.network.apply,
        run.prepare,
        run.frozen.encode,
        schedule=run.config.schedule,
        prediction=run.prediction,
        levels=levels,
    )

    @functools.partial(jit, mesh=run.mesh, out_shardings=replicated(run.mesh))
    def losses(params: Params, frozen: Params, part: Batch) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(run.key("eval"), part.index)
        return loss(params, frozen, part, keys)

    def validate(
        params: Params, frozen: Params, pause: Callable[[], None] = proceed
    ) -> dict[str, float]:
        found = []
        for part in parts:
            found.append(jax.device_get(losses(params, frozen, put_same(part, run.mesh))))
            pause()
        values = np.concatenate(found)[:count].mean(0, dtype=np.float64).tolist()
        return dict(zip(map(str, levels), values, strict=True))

    return validate


def _batches(run: Run) -> tuple[list[Batch], int]:
    """Batches of the validation loss, the last one filled up with its last record, and the number of records."""
    directory, size = run.validation_records, run.config.sampling.batch
    count = min(run.config.eval.validation, run.check_records(directory).written)
    parts = [
        fixed_batch(
            directory,
            [min(n, count - 1) for n in range(first, first + size)],
            tokenizer=run.tokenizer,
        )
        for first in range(0, count, size)
    ]
    return parts, count
