"""Inception-v3 (Szegedy et al. 2016, arXiv:1512.00567) as FID uses it: the network of TensorFlow's 2015-12-05 graph.

It differs from the paper's in what that graph does: average pools leave padding out of the mean, the last block pools
by its maximum, and there are 1008 classes. The reference is torch-fidelity's translation of it. Layers carry the names
that they have there, so parameter paths translate mechanically (`models/names.py`):

    Mixed_5b/branch1x1/conv/kernel        Mixed_5b.branch1x1.conv.weight

The weights were released as a file of torch's, `weights-inception-2015-12-05-6726825d.pth` by torch-fidelity and the
same as `pt_inception-2015-12-05-6726825d.pth` by pytorch-fid, of which `python -m ldm_jax.convert` makes a directory.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ldm_jax.models.json_files import check_known, fields_of, typed
from ldm_jax.models.names import Names
from ldm_jax.nn.layers import Map
from ldm_jax.nn.platform import num_devices, platform
from ldm_jax.types import Images

CLASS = {"_class_name": "Inception"}
NAMES = Names(unused=(r"\.num_batches_tracked$",))
EPSILON = 1e-3
SMALLEST = 75  # pixels a side; of less the strided layers leave nothing
DIVISORS = (1, 2, 4, 8, 16)
# A TPU's default rounds factors to bfloat16, and scores drift by more than what they are compared by.
PRECISION = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class InceptionConfig:
    """All widths but that of the classes are divided by `divisor`: 1 is FID's network, 16 the smallest for tests.

    Raises ValueError for a divisor that is not one of all widths.
    """

    divisor: int = 1

    def __post_init__(self) -> None:
        if self.divisor not in DIVISORS:
            raise ValueError(
                f"divisor is {self.divisor}; it can be {', '.join(map(str, DIVISORS))}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "InceptionConfig":
        """The config as its `config.json` has it."""
        fields = fields_of(cls)
        check_known(values, {**CLASS, **fields}, "Inception")
        return cls(**typed(values, fields))

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {**CLASS, **dataclasses.asdict(self)}

    @property
    def names(self) -> Names:
        """How checkpoints name the parameters."""
        return NAMES


class InceptionOutput(NamedTuple):
    """`pooled` is what FID and KID compare; `unbiased`, logits without their bias, what the inception score takes."""

    pooled: Float[Array, "B D"]
    logits: Float[Array, "B classes"]
    unbiased: Float[Array, "B classes"]


class Conv(NamedTuple):
    """A step: a convolution, its batch norm and a ReLU."""

    name: str
    outputs: int
    taps: tuple[int, int] = (1, 1)
    strides: int = 1
    padding: str = "SAME"


class Split(NamedTuple):
    """A step: branches side by side, of one step or more each; their outputs are concatenated."""

    branches: tuple[tuple[Any, ...], ...]


class Mixed(NamedTuple):
    """A step: a named group of branches."""

    name: str
    split: Split


average = functools.partial(
    nnx.avg_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME", count_include_pad=False
)
maximum = functools.partial(nnx.max_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME")
halving = functools.partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2))


def block_a(name: str, pooled: int) -> Mixed:
    """5x5 taps in one branch, as in figure 4 of the paper, and 3x3 taps twice in another, as in figure 5."""
    five = Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))
    three = (
        Conv("branch3x3dbl_1", 64),
        Conv("branch3x3dbl_2", 96, (3, 3)),
        Conv("branch3x3dbl_3", 96, (3, 3)),
    )
    pool = average, Conv("branch_pool", pooled)
    return Mixed(name, Split(((Conv("branch1x1", 64),), five, three, pool)))


def block_b(name: str) -> Mixed:
    """Halves rows and columns: figure 10."""
    once = (Conv("branch3x3", 384, (3, 3), 2, "VALID"),)
    twice = (
        Conv("branch3x3dbl_1", 64),
        Conv("branch3x3dbl_2", 96, (3, 3)),
        Conv("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
    )
    return Mixed(name, Split((once, twice, (halving,))))


def block_c(name: str, width: int) -> Mixed:
    """7x7 taps as 1x7 and 7x1: figure 6."""
    once = (
        Conv("branch7x7_1", width),
        Conv("branch7x7_2", width, (1, 7)),
        Conv("branch7x7_3", 192, (7, 1)),
    )
    twice = (
        Conv("branch7x7dbl_1", width),
        Conv("branch7x7dbl_2", width, (7, 1)),
        Conv("branch7x7dbl_3", width, (1, 7)),
        Conv("branch7x7dbl_4", width, (7, 1)),
        Conv("branch7x7dbl_5", 192, (1, 7)),
    )
    pool = average, Conv("branch_pool", 192)
    return Mixed(name, Split(((Conv("branch1x1", 192),), once, twice, pool)))


def block_d(name: str) -> Mixed:
    """Halves rows and columns a second time."""
    three = Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2, "VALID")
    seven = (
        Conv("branch7x7x3_1", 192),
        Conv("branch7x7x3_2", 192, (1, 7)),
        Conv("branch7x7x3_3", 192, (7, 1)),
        Conv("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
    )
    return Mixed(name, Split((three, seven, (halving,))))


def block_e(name: str, pool: Callable[[Map], Map]) -> Mixed:
    """Rows of taps beside columns of taps: figure 7."""
    once = Conv("branch3x3_1", 384), _crossed("branch3x3_2")
    twice = (
        Conv("branch3x3dbl_1", 448),
        Conv("branch3x3dbl_2", 384, (3, 3)),
        _crossed("branch3x3dbl_3"),
    )
    pooled = pool, Conv("branch_pool", 192)
    return Mixed(name, Split(((Conv("branch1x1", 320),), once, twice, pooled)))


def _crossed(name: str) -> Split:
    return Split(((Conv(f"{name}a", 384, (1, 3)),), (Conv(f"{name}b", 384, (3, 1)),)))


STEPS = (  # after table 1 of the paper
    Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    Conv("Conv2d_2a_3x3", 32, (3, 3), padding="VALID"),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    halving,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), padding="VALID"),
    halving,
    block_a("Mixed_5b", 32),
    block_a("Mixed_5c", 64),
    block_a("Mixed_5d", 64),
    block_b("Mixed_6a"),
    block_c("Mixed_6b", 128),
    block_c("Mixed_6c", 160),
    block_c("Mixed_6d", 160),
    block_c("Mixed_6e", 192),
    block_d("Mixed_7a"),
    block_e("Mixed_7b", average),
    block_e("Mixed_7c", maximum),
)


class Group(nnx.Module):
    """Layers under the names of their steps. `width` is that of what comes out."""

    def __init__(self, steps: tuple[Any, ...], inputs: int, divisor: int, rngs: nnx.Rngs) -> None:
        self.width = self._add(steps, inputs, divisor, rngs)
        self.steps = steps

    def __call__(self, x: Map) -> Map:
        return self._run(self.steps, x)

    def _add(self, steps: tuple[Any, ...], width: int, divisor: int, rngs: nnx.Rngs) -> int:
        for step in steps:
            if isinstance(step, Split):
                width = sum(self._add(branch, width, divisor, rngs) for branch in step.branches)
            elif isinstance(step, Conv):
                setattr(self, step.name, ConvNorm(step, width, divisor, rngs))
                width = step.outputs // divisor
            elif isinstance(step, Mixed):
                group = Group((step.split,), width, divisor, rngs)
                setattr(self, step.name, group)
                width = group.width
        return width

    def _run(self, steps: tuple[Any, ...], x: Map) -> Map:
        for step in steps:
            if isinstance(step, Split):
                x = jnp.concatenate([self._run(branch, x) for branch in step.branches], axis=-1)
            elif isinstance(step, Conv | Mixed):
                x = getattr(self, step.name)(x)
            else:
                x = step(x)  # a pool
        return x


class ConvNorm(nnx.Module):
    """A convolution, a batch norm by stored moments, a ReLU."""

    def __init__(self, step: Conv, inputs: int, divisor: int, rngs: nnx.Rngs) -> None:
        outputs = step.outputs // divisor
        self.conv = nnx.Conv(
            inputs,
            outputs,
            step.taps,
            strides=step.strides,
            padding=step.padding,
            use_bias=False,
            precision=PRECISION,
            rngs=rngs,
        )
        self.bn = BatchNorm(outputs)

    def __call__(self, x: Map) -> Map:
        return jax.nn.relu(self.bn(self.conv(x)))


class BatchNorm(nnx.Module):
    """Batch normalisation (Ioffe & Szegedy 2015, arXiv:1502.03167) of inference: its moments are parameters.

    The released weights learnt no scale: theirs is 1.
    """

    def __init__(self, channels: int) -> None:
        self.scale, self.running_var = (nnx.Param(jnp.ones((channels,))) for _ in range(2))
        self.bias, self.running_mean = (nnx.Param(jnp.zeros((channels,))) for _ in range(2))

    def __call__(self, x: Map) -> Map:
        slope = self.scale[...] * jax.lax.rsqrt(self.running_var[...] + EPSILON)
        offset = self.bias[...] - self.running_mean[...] * slope
        return x * slope[None, None, None] + offset[None, None, None]


class Inception(Group):
    """Images to features and logits. Its layers are attributes under their names in STEPS."""

    def __init__(self, config: InceptionConfig, rngs: nnx.Rngs) -> None:
        super().__init__(STEPS, 3, config.divisor, rngs)
        self.fc = nnx.Linear(self.width, 1008, rngs=rngs)

    def __call__(self, images: Images) -> InceptionOutput:
        """Features of images in [-1, 1], in float32. FID wants 299 x 299 pixels: `metrics/resize.py`.

        Raises ValueError for fewer than 75 rows or columns.
        """
        rows, columns = images.shape[1:3]
        if min(rows, columns) < SMALLEST:
            raise ValueError(
                f"images of {rows} x {columns} pixels; Inception takes at least {SMALLEST} x {SMALLEST}"
            )
        pooled = self._one_by_one(images) if _alone_on_a_cpu() else self._pooled(images)
        unbiased = jnp.matmul(pooled, self.fc.kernel[...], precision=PRECISION)
        return InceptionOutput(pooled, unbiased + self.fc.bias[...][None], unbiased)

    def _pooled(self, images: Images) -> Float[Array, "B D"]:
        pixels = (jnp.asarray(images, jnp.float32) + 1) * 127.5
        maps = super().__call__((pixels - 128) / 128)  # so the graph has it: white is 127/128
        return jnp.mean(maps, axis=(1, 2))

    def _one_by_one(self, images: Images) -> Float[Array, "B D"]:
        """The maps of one image, which caches hold and memory is kept for: six tenths of the time of many at once."""
        return jax.lax.map(lambda image: self._pooled(image[None])[0], images)


def _alone_on_a_cpu() -> bool:
    return platform() == "cpu" and num_devices() == 1
