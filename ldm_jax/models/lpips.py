"""LPIPS, a learned perceptual distance between images (Zhang et al. 2018, arXiv:1801.03924), version 0.1.

Weights carry torchvision's names in the trunk (`features.0.weight`) and the lpips package's above it
(`lin0.model.1.weight`); what the package's own `state_dict` holds is read as well. They were released in two files of
torch's, of which `python -m ldm_jax.convert` makes a directory.
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
from ldm_jax.models.names import Names, check_fixed
from ldm_jax.nn.layers import Map
from ldm_jax.types import Images

SHIFT = (-0.030, -0.088, -0.188)  # ImageNet's mean and deviation, for images in [-1, 1]
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10
CLASS = {"_class_name": "LPIPS"}
FIXED = {"version": "0.1"}  # 0.0 did not scale its input
# A TPU's default rounds factors to bfloat16, and small distances are differences of what is almost alike.
PRECISION = jax.lax.Precision.HIGHEST


class Convolution(NamedTuple):
    """A convolution with a ReLU after it."""

    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


class Pool(NamedTuple):
    """The maximum of `window` x `window` pixels, every two rows and columns."""

    window: int


class Trunk(NamedTuple):
    """The layers of a network, in torchvision's order.

    taps: the ReLUs after which images are compared, as torchvision counts: a convolution and its ReLU are two.
    least: the least side, in pixels, of which the last map has a pixel.
    """

    layers: tuple[Convolution | Pool, ...]
    taps: tuple[int, ...]
    least: int


def _level(channels: int, depth: int) -> tuple[Convolution, ...]:
    return (Convolution(channels),) * depth


# AlexNet as in Krizhevsky (2014, arXiv:1404.5997); VGG16, column D of Simonyan & Zisserman (2014, arXiv:1409.1556).
TRUNKS = {
    "alex": Trunk(
        (
            Convolution(64, 11, 4, 2),
            Pool(3),
            Convolution(192, 5, 1, 2),
            Pool(3),
            Convolution(384),
            *_level(256, 2),
        ),
        taps=(1, 4, 7, 9, 11),
        least=31,
    ),
    "vgg": Trunk(
        (
            *_level(64, 2),
            Pool(2),
            *_level(128, 2),
            Pool(2),
            *_level(256, 3),
            Pool(2),
            *_level(512, 3),
            Pool(2),
            *_level(512, 3),
        ),
        taps=(3, 8, 15, 22, 29),
        least=16,
    ),
}
_LINS = tuple(f"lin{i}" for i in range(5))
NAMES = Names(
    renames=tuple((lin, f"{lin}.model.1") for lin in _LINS),
    pointwise=_LINS,
    legacy=((r"^net\.slice\d\.", "features."),),
    unused=(
        r"^lins\.",
        r"^scaling_layer\.",
        r"^classifier\.",
    ),  # twins, constants, the rest of a trunk
)


@dataclasses.dataclass(frozen=True)
class LPIPSConfig:
    """`net` is a row of TRUNKS, whose widths are divided by `divisor`: 1 in all that was released, more in tests.

    Raises ValueError for another `net`, and for a `divisor` that does not divide 64.
    """

    net: str = "alex"
    divisor: int = 1

    def __post_init__(self) -> None:
        if self.net not in TRUNKS:
            raise ValueError(f"net is {self.net!r}; LPIPS has {', '.join(TRUNKS)}")
        if self.divisor < 1 or 64 % self.divisor:
            raise ValueError(f"divisor is {self.divisor}; it divides 64, the least of the widths")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LPIPSConfig":
        """From the content of its `config.json`. Raises ValueError for another version."""
        check_fixed(values, FIXED, "LPIPS")
        fields = fields_of(cls)
        check_known(values, {**CLASS, **FIXED, **fields}, "LPIPS")
        return cls(**typed(values, fields))

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {**CLASS, **FIXED, **dataclasses.asdict(self)}

    @property
    def names(self) -> Names:
        """How checkpoints name the parameters."""
        return NAMES


class LPIPS(nnx.Module):
    """The distance of two images: their features' differences in five maps, squared and weighed by channel."""

    def __init__(self, config: LPIPSConfig, rngs: nnx.Rngs) -> None:
        trunk = TRUNKS[config.net]
        self.features = nnx.List(_layers(trunk, config.divisor, rngs))
        for name, tap in zip(_LINS, trunk.taps, strict=True):
            width = self.features[tap - 1].out_features
            options = {"kernel_init": nnx.initializers.constant(1 / width), "precision": PRECISION}
            setattr(self, name, nnx.Linear(width, 1, use_bias=False, **options, rngs=rngs))
        self.config = config

    def __call__(self, images: Images, others: Images) -> Float[Array, " B"]:
        """The distance of each image in [-1, 1] from the one at its place in `others`; equation 1, summed over maps.

        Raises ValueError for images that are too small for the trunk.
        """
        distances = [
            jnp.mean(getattr(self, name)(jnp.square(ours - theirs)), axis=(1, 2, 3))
            for name, ours, theirs in zip(_LINS, self.maps(images), self.maps(others), strict=True)
        ]
        return sum(distances)

    def maps(self, images: Images) -> list[Map]:
        """The five maps of features, each pixel of unit norm."""
        trunk = TRUNKS[self.config.net]
        if min(images.shape[1:3]) < trunk.least:
            raise ValueError(
                f"images are {images.shape[1:3]} pixels; LPIPS with {self.config.net} takes {trunk.least} or more"
            )
        shift, scale = (jnp.array(channels)[None, None, None] for channels in (SHIFT, SCALE))
        x, maps = (images - shift) / scale, []
        for at, layer in enumerate(self.features):
            x = layer(x)
            if at in trunk.taps:
                maps.append(x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + EPSILON))
        return maps


def _layers(trunk: Trunk, divisor: int, rngs: nnx.Rngs) -> list[Callable[[jax.Array], jax.Array]]:
    """One a place in torchvision's `features`."""
    layers: list[Callable[[jax.Array], jax.Array]] = []
    width = 3
    for layer in trunk.layers:
        if isinstance(layer, Pool):
            window = (layer.window, layer.window)
            layers.append(functools.partial(nnx.max_pool, window_shape=window, strides=(2, 2)))
            continue
        channels = layer.channels // divisor
        layers += [_convolution(layer, width, channels, rngs), nnx.relu]
        width = channels
    return layers


def _convolution(layer: Convolution, inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        kernel_size=(layer.kernel, layer.kernel),
        strides=(layer.stride, layer.stride),
        padding=layer.padding,
        precision=PRECISION,
        rngs=rngs,
    )
