"""What is drawn at random for each example.

Everything hangs on the example's own key or on its index in the global order: never on the batch,
its size or the devices it lies on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from ldm_jax.types import Arr, Keys

Draw = Callable[[Keys, UInt32[Arr, " B"]], Float[Array, " B"]]

# 2^32 / golden ratio, rounded down to an odd number: its multiples mod 2^32 visit each number once.
_GOLDEN = 0x9E3779B9


def gaussian(keys: Keys, shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Standard normal noise of `shape` for each key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


@dataclass(frozen=True)
class Independent:
    """Uniforms on (0, 1), each from its example's key."""

    def __call__(self, keys: Keys, index: UInt32[Arr, " B"]) -> Float[Array, " B"]:
        return _open_uniform(jax.vmap(partial(jax.random.bits, dtype=jnp.uint32))(keys))


@dataclass(frozen=True)
class Weyl:
    """Low-discrepancy uniforms on (0, 1): the fractions of index / golden ratio, offset by `seed`.

    Any run of consecutive examples fills the interval evenly, so that a batch sees all noise levels
    and its loss varies less, as with the stratified times of Kingma et al. (2021, appendix I.1),
    but whatever the batch size and the number of devices. Integer arithmetic mod 2^32 is exact.

    Raises:
      ValueError: `seed` does not fit into 32 bits.
    """

    # of the offset
    seed: int = field(default=0, metadata={"range": "[0, 4294967295]"})

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"Weyl needs a seed from 0 to 4294967295, got {self.seed}")

    def __call__(self, keys: Keys, index: UInt32[Arr, " B"]) -> Float[Array, " B"]:
        offset = np.random.SeedSequence(self.seed).generate_state(1)[0]
        return _open_uniform(jnp.asarray(index) * jnp.uint32(_GOLDEN) + offset)


def _open_uniform(bits: UInt32[Array, " B"]) -> Float[Array, " B"]:
    """The middle of one of 2^23 cells: exact in f32 and never 0 or 1, the ill-posed ends."""
    return ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
