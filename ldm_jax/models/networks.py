"""The networks that a directory may hold, by the class that its config.json names."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.models import names, weights
from ldm_jax.models.clip import CLIP, CLIPConfig, CLIPText, CLIPTextConfig
from ldm_jax.models.dinov2 import Dinov2, Dinov2Config
from ldm_jax.models.inception import Inception, InceptionConfig
from ldm_jax.models.json_files import naming, typed
from ldm_jax.models.kl import AutoencoderKL, KLConfig
from ldm_jax.models.lpips import LPIPS, LPIPSConfig
from ldm_jax.models.names import Names
from ldm_jax.models.pixart import PixArt
from ldm_jax.models.pixart_config import PixArtConfig
from ldm_jax.models.reader import Reader, ReaderConfig
from ldm_jax.models.t5 import T5Config, T5Encoder
from ldm_jax.models.unet import UNet
from ldm_jax.models.unet_config import UNetConfig
from ldm_jax.models.uvit import UViT
from ldm_jax.models.uvit_config import UViTConfig
from ldm_jax.nn.functional import Functional, functional


class Kind(NamedTuple):
    """A network's config and module, how its config.json is read and written, and its checkpoints' names."""

    config: type
    module: type
    read: Callable[[Mapping[str, Any]], Any]
    write: Callable[[Any], dict[str, Any]]
    names: Callable[[Any], Names]


def _own(config: Any) -> Names:
    return config.names


_CLIP_TEXT = Kind(
    CLIPTextConfig,
    CLIPText,
    CLIPTextConfig.from_transformers,
    CLIPTextConfig.to_transformers,
    lambda _: names.CLIP_TEXT,
)
_T5 = Kind(T5Config, T5Encoder, T5Config.from_transformers, T5Config.to_transformers, _own)

KINDS = {
    "AutoencoderKL": Kind(
        KLConfig, AutoencoderKL, KLConfig.from_diffusers, KLConfig.to_diffusers, _own
    ),
    "UNet2DConditionModel": Kind(
        UNetConfig, UNet, UNetConfig.from_diffusers, UNetConfig.to_diffusers, _own
    ),
    "PixArtTransformer2DModel": Kind(
        PixArtConfig, PixArt, PixArtConfig.from_diffusers, PixArtConfig.to_diffusers, _own
    ),
    "UViT": Kind(UViTConfig, UViT, UViTConfig.from_dict, UViTConfig.to_dict, _own),
    "CLIPTextModel": _CLIP_TEXT,
    "CLIPTextModelWithProjection": _CLIP_TEXT,
    "CLIPModel": Kind(
        CLIPConfig,
        CLIP,
        CLIPConfig.from_transformers,
        CLIPConfig.to_transformers,
        lambda _: names.CLIP,
    ),
    "Dinov2Model": Kind(
        Dinov2Config, Dinov2, Dinov2Config.from_transformers, Dinov2Config.to_transformers, _own
    ),
    "Inception": Kind(
        InceptionConfig, Inception, InceptionConfig.from_dict, InceptionConfig.to_dict, _own
    ),
    "LPIPS": Kind(LPIPSConfig, LPIPS, LPIPSConfig.from_dict, LPIPSConfig.to_dict, _own),
    "T5EncoderModel": _T5,
    "T5ForConditionalGeneration": _T5,
    "Reader": Kind(
        ReaderConfig, Reader, ReaderConfig.from_dict, ReaderConfig.to_dict, lambda _: Names()
    ),
}
NAMES = {"_class_name": (str | None, None), "architectures": (tuple[str, ...] | None, None)}
MODULES = {kind.config: kind.module for kind in KINDS.values()}


@functools.lru_cache(maxsize=8)
def make_network(config: Any) -> Functional:
    """The network of a config; the same object for the same config, as its constructor takes seconds to trace."""
    return functional(lambda rngs: MODULES[type(config)](config, rngs))


def described(directory: Path) -> tuple[Kind, Any]:
    """The kind of network that a directory holds, and its config.

    Raises FileNotFoundError without a config.json, ValueError for a class that there is not, or a choice in its
    config that the network here does not have.
    """
    values = weights.read_config(directory)
    with naming(directory / "config.json"):
        named = typed(values, NAMES, free=NAMES)
        name = named["_class_name"] or (named["architectures"] or ["nothing"])[0]
        if name not in KINDS:
            raise ValueError(f"{directory} holds {name}; it can be {', '.join(KINDS)}")
        return KINDS[name], KINDS[name].read(values)
