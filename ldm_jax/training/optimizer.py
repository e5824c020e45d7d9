"""AdamW with warm-up and clipping; its clock counts examples."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ldm_jax.parallel.rules import leaf_name
from ldm_jax.settings.fields import check_fields, one_of, setting

CONSTANT = "constant"


def _constant(progress: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.ones_like(progress)


def _cosine(progress: Float[Array, ""]) -> Float[Array, ""]:
    return 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))


SCHEDULES: dict[str, Callable[[Float[Array, ""]], Float[Array, ""]]] = {
    CONSTANT: _constant,
    "cosine": _cosine,
}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) after clipping the gradient to the norm `clip_norm`.

    The rate rises linearly over the first `warmup_examples` and then follows `schedule`: "constant"
    does not know how long the run is, so that a run may be extended; "cosine" falls to zero at its
    end. Weight decay leaves biases, scales and whatever else has fewer than two dimensions alone.
    `clip_norm` of inf does not clip.
    """

    learning_rate: float = setting(1e-4, within="[0, inf)")  # its peak
    # examples over which the rate rises linearly
    warmup_examples: int = setting(0, within="[0, inf)")
    # after the warm-up: constant, or cosine to zero at the end of the run
    schedule: str = one_of(SCHEDULES, CONSTANT)
    b1: float = setting(0.9, within="[0, 1)")  # decay of AdamW's first moment
    b2: float = setting(0.999, within="[0, 1)")  # decay of its second moment
    eps: float = setting(1e-8, within="[0, inf)")  # added to the root of the second moment
    # of matrices and kernels; biases and scales are left alone
    weight_decay: float = setting(0.01, within="[0, inf)")
    # largest norm of the gradient; inf: no clipping
    clip_norm: float = setting(1.0, within="(0, inf]")

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def extendable(self) -> bool:
        """Whether the rate does not depend on the length of the run, which may then change."""
        return self.schedule == CONSTANT


def make_optimizer(
    config: OptimizerConfig, *, batch_size: int, examples: int
) -> optax.GradientTransformation:
    """The optimiser of a run over `examples` in batches of `batch_size`."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, batch_size=batch_size, examples=examples),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def restricted(
    tx: optax.GradientTransformation, trained: Sequence[str]
) -> optax.GradientTransformation:
    """Returns `tx` for the parameters whose paths match one of the fnmatch patterns; the others keep their values."""
    if tuple(trained) == ("*",):
        return tx

    def labels(params: Any) -> Any:
        def label(path: tuple[Any, ...], leaf: Any) -> str:
            name = leaf_name(path)
            return "trained" if any(fnmatch.fnmatch(name, row) for row in trained) else "kept"

        return jax.tree_util.tree_map_with_path(label, params)

    return optax.partition({"trained": tx, "kept": optax.set_to_zero()}, labels)


def learning_rate(config: OptimizerConfig, *, batch_size: int, examples: int) -> optax.Schedule:
    """The rate as a function of the number of updates made, which optax counts.

    An update is placed at the examples seen after it, so that the first one of a warm-up is not
    wasted on a rate of zero.
    """
    # All in floats: a long run of large batches would overflow int32.
    warmup = float(config.warmup_examples)
    decay = max(1.0, examples - warmup)

    def rate(count: Any) -> Float[Array, ""]:
        seen = (jnp.asarray(count, jnp.float32) + 1.0) * batch_size
        rise = jnp.minimum(1.0, seen / warmup) if warmup else 1.0
        return config.learning_rate * rise * SCHEDULES[config.schedule]((seen - warmup) / decay)

    return rate


def decayed(params: Any) -> Any:
    """Which leaves are decayed; by name as well, since stacked blocks have matrices of biases."""

    def is_weight(path: tuple[Any, ...], leaf: Any) -> bool:
        return leaf.ndim > 1 and leaf_name(path[-1:]) not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(is_weight, params)
