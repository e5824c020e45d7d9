"""The protocol of an objective: what it needs, what it trains, and its loss."""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from ldm_jax.diffusion.losses import Loss
from ldm_jax.types import Batch

# `ldm_jax.runs.run.Run`, which stands above this room: a loss is made of its `config`, `apply`, `prepare`,
# `prediction` and `frozen`.
Run = Any

# Makes a parameter from its fresh value and from the one of the parent; None where the parent has none.
Rule = Callable[[Array, Array | None], Array]


class Difference(NamedTuple):
    """A parameter in which a run may differ from the network that it is initialised from.

    Attributes:
      parameter: its path, an fnmatch pattern such as "conv_in/kernel".
      rule: how its first value is made.
      setting: the setting of the backbone that makes the difference.
    """

    parameter: str
    rule: Rule
    setting: str


def zero_channels(fresh: Array, parent: Array | None) -> Array:
    """Returns the parent's kernel with zeros for the input channels that were added behind its own.

    Raises ValueError where the kernels differ in more than the number of input channels.
    """
    if parent is None or parent.ndim != fresh.ndim or parent.shape[-2] > fresh.shape[-2]:
        raise ValueError("only input channels may be added")
    added = [(0, 0)] * fresh.ndim
    added[-2] = (0, fresh.shape[-2] - parent.shape[-2])
    result = jnp.pad(parent, added)
    if result.shape != fresh.shape:
        raise ValueError("only input channels may be added")
    return result


def fresh_value(fresh: Array, parent: Array | None) -> Array:
    """Returns the fresh value of a parameter that the parent does not have."""
    return fresh


@dataclass(frozen=True)
class Objective(abc.ABC):
    """What a training minimises; a subclass is a row of `OBJECTIVES`, and its fields are its settings.

    Attributes:
      differs: the parameters in which a run may differ from its parent.
      trained: fnmatch patterns of the paths of the parameters that are trained; the others keep their values.
    """

    differs: ClassVar[tuple[Difference, ...]] = ()
    trained: ClassVar[tuple[str, ...]] = ("*",)

    @abc.abstractmethod
    def loss(self, run: Run) -> Loss:
        """Makes `loss(params, ema, frozen, batch, keys) -> [B]`."""

    def needs(self, batch: Batch) -> str:
        """Says what the objective needs and a batch does not hold; "" where nothing is missing."""
        return ""

    def networks(self) -> Mapping[str, str]:
        """Names frozen backbones beside the run's networks, and the directory of each: a run or a pipeline.

        The loss finds their parameters in `frozen` by name.
        """
        return {}

    def half_life(self, run: Run) -> float:
        """Returns the half-life of the average of the parameters in examples; 0: no average."""
        return run.config.train.ema
