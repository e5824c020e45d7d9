"""CLIP's text and image towers (Radford et al. 2021, arXiv:2103.00020), as transformers lays them out.

Attributes carry the names of the transformers classes, so parameter paths translate mechanically:
`encoder/layers/block/self_attn/q_proj/kernel` is `encoder.layers.{i}.self_attn.q_proj.weight`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from ldm_jax.models.json_files import fields_of, typed
from ldm_jax.models.names import check_fixed
from ldm_jax.nn.attention import attention
from ldm_jax.nn.layers import from_heads, into_heads, linear
from ldm_jax.nn.norms import LayerNorm
from ldm_jax.nn.stack import Stack
from ldm_jax.types import Images, Tokens

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Fields of a config.json that are none of a tower's, or have another default there.
ARCHITECTURES = {"architectures": (tuple[str, ...] | None, None)}
PROJECTION = {"projection_dim": (int, 512)}
TOWERS = ("text_config", "text_config_dict", "vision_config", "vision_config_dict")
FREE = ("bos_token_id", "eos_token_id", "pad_token_id", "architectures")  # 0 is one of their values

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """What both towers have; fields and their defaults are transformers', but for two.

    `projection_dim` 0 means a tower without a projection of its own, and `dtype` is that of the computation.
    """

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 0
    dtype: str = "float32"
    _architecture: ClassVar[str]
    _model_type: ClassVar[str]

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act is {self.hidden_act!r}; it can be {', '.join(ACTIVATIONS)}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )

    @classmethod
    def from_transformers(cls, values: Mapping[str, Any], dtype: str = "float32") -> "TowerConfig":
        """From the content of a `config.json`; what it leaves out has transformers' default."""
        check_fixed(values, {"num_channels": 3}, "a CLIP tower")
        known = typed(values, {**fields_of(cls), **PROJECTION, **ARCHITECTURES}, free=FREE)
        architectures = known.pop("architectures") or ()
        if not any(name.endswith("WithProjection") for name in architectures):
            known["projection_dim"] = 0
        return cls(**known, dtype=dtype)

    def to_transformers(self) -> dict[str, Any]:
        """The content of the `config.json` that transformers reads."""
        values = dataclasses.asdict(self)
        del values["dtype"]
        suffix = "WithProjection" if self.projection_dim else ""
        if not self.projection_dim:
            del values["projection_dim"]
        names = {"architectures": [self._architecture + suffix], "model_type": self._model_type}
        return {**names, **values}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(TowerConfig):
    """`eos_token_id` 2 is what old files say; the pooled token is then the one of the highest id."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    bos_token_id: int = 49406
    pad_token_id: int = 1
    _architecture: ClassVar[str] = "CLIPTextModel"
    _model_type: ClassVar[str] = "clip_text_model"


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(TowerConfig):
    """An image tower for square images of `image_size` pixels."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    _architecture: ClassVar[str] = "CLIPVisionModel"
    _model_type: ClassVar[str] = "clip_vision_model"


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers, which have no projections of their own here, and the width of the shared space."""

    text: CLIPTextConfig = CLIPTextConfig()
    vision: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512

    @classmethod
    def from_transformers(cls, values: Mapping[str, Any], dtype: str = "float32") -> "CLIPConfig":
        """From the content of a `config.json` of transformers' CLIPModel."""

        known = typed(values, {**dict.fromkeys(TOWERS, (dict | None, None)), **PROJECTION})

        def tower(name: str) -> dict[str, Any]:
            merged = {**(known[name] or {}), **(known[f"{name}_dict"] or {})}
            return {**merged, "architectures": None}

        return cls(
            text=CLIPTextConfig.from_transformers(tower("text_config"), dtype),
            vision=CLIPVisionConfig.from_transformers(tower("vision_config"), dtype),
            projection_dim=known["projection_dim"],
        )

    def to_transformers(self) -> dict[str, Any]:
        """The content of the `config.json` that transformers' CLIPModel reads."""
        shared = {"projection_dim": self.projection_dim}
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "text_config": {**self.text.to_transformers(), **shared},
            "vision_config": {**self.vision.to_transformers(), **shared},
            **shared,
        }


class TextOutput(NamedTuple):
    """`last` is after the final norm (SD1.5, SD2.1), `penultimate` the last layer's input, not normed (SDXL)."""

    last: Float[Array, "B L E"]
    penultimate: Float[Array, "B L E"]
    pooled: Float[Array, "B E"]
    projected: Float[Array, "B P"] | None


class VisionOutput(NamedTuple):
    """`last` is not normed, its first token is the class token; `pooled` is that token, normed."""

    last: Float[Array, "B N D"]
    pooled: Float[Array, "B D"]
    projected: Float[Array, "B P"] | None


def _linear(
    inputs: int, outputs: int, std: float, dtype: str, rngs: nnx.Rngs, use_bias: bool = True
) -> nnx.Linear:
    init = nnx.initializers.normal(std)
    return linear(inputs, outputs, use_bias=use_bias, kernel_init=init, dtype=dtype, rngs=rngs)


def _embed(num: int, features: int, dtype: str, rngs: nnx.Rngs) -> nnx.Embed:
    init = nnx.initializers.normal(0.02)
    return nnx.Embed(num, features, embedding_init=init, dtype=dtype, rngs=rngs)


def layer_norm(config: Any, rngs: nnx.Rngs) -> LayerNorm:
    """That of a tower, CLIP's or another of transformers', whose config has its width and its epsilon."""
    return LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=config.dtype,
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Self-attention of one layer."""

    def __init__(self, config: TowerConfig, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        std = width**-0.5 * (2 * config.num_hidden_layers) ** -0.5
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(width, width, std, config.dtype, rngs) for _ in range(3)
        )
        self.out_proj = _linear(width, width, width**-0.5, config.dtype, rngs)
        self.num_heads = config.num_attention_heads

    def __call__(self, x_BLD: Float[Array, "B L D"], causal: bool) -> Float[Array, "B L D"]:
        q, k, v = (
            into_heads(layer, x_BLD, self.num_heads)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return from_heads(self.out_proj, attention(q, k, v, causal=causal))


class MLP(nnx.Module):
    """The feed-forward part of one layer."""

    def __init__(self, config: TowerConfig, rngs: nnx.Rngs) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        std = width**-0.5 * (2 * config.num_hidden_layers) ** -0.5
        self.fc1 = _linear(width, inner, (2 * width) ** -0.5, config.dtype, rngs)
        self.fc2 = _linear(inner, width, std, config.dtype, rngs)
        self.hidden_act = config.hidden_act

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x_BLD)))


class EncoderLayer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: TowerConfig, rngs: nnx.Rngs) -> None:
        self.layer_norm1 = layer_norm(config, rngs)
        self.self_attn = Attention(config, rngs)
        self.layer_norm2 = layer_norm(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x_BLD: Float[Array, "B L D"], causal: bool) -> Float[Array, "B L D"]:
        x_BLD += self.self_attn(self.layer_norm1(x_BLD), causal)
        return x_BLD + self.mlp(self.layer_norm2(x_BLD))


class Encoder(nnx.Module):
    """The layers of a tower."""

    def __init__(self, config: TowerConfig, rngs: nnx.Rngs) -> None:
        self.layers = Stack(lambda rngs: EncoderLayer(config, rngs), config.num_hidden_layers, rngs)

    def __call__(
        self, x_BLD: Float[Array, "B L D"], causal: bool
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
        """The output of the last layer, and its input."""

        def call(layer: EncoderLayer, carry: Any, _: None) -> tuple[Any, None]:
            return (layer(carry[0], causal), carry[0]), None

        return self.layers.scan(call, (x_BLD, x_BLD))[0]


class TextEmbeddings(nnx.Module):
    """Token and position embeddings."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs) -> None:
        width, length = config.hidden_size, config.max_position_embeddings
        self.token_embedding = _embed(config.vocab_size, width, config.dtype, rngs)
        self.position_embedding = _embed(length, width, config.dtype, rngs)
        self.max_length = length

    def __call__(self, tokens: Tokens) -> Float[Array, "B L D"]:
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"{length} tokens a caption; this text tower has {self.max_length} positions"
            )
        return self.token_embedding(tokens) + self.position_embedding(jnp.arange(length))[None]


class CLIPText(nnx.Module):
    """Transformers' CLIPTextModel, or CLIPTextModelWithProjection where `projection_dim` is not 0."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs) -> None:
        self.embeddings = TextEmbeddings(config, rngs)
        self.encoder = Encoder(config, rngs)
        self.final_layer_norm = layer_norm(config, rngs)
        if config.projection_dim:
            self.text_projection = _projection(config, config.projection_dim, rngs)
        self.config = config

    def __call__(self, tokens: Tokens) -> TextOutput:
        """Encodes captions `[B, L]`, each with its end token; attention is causal, padding is not masked."""
        last, penultimate = self.encoder(self.embeddings(tokens), causal=True)
        last = self.final_layer_norm(last)
        end_B = _end_position(tokens, self.config.eos_token_id)
        pooled = jnp.take_along_axis(last, end_B[:, None, None], axis=1)[:, 0]
        projected = self.text_projection(pooled) if self.config.projection_dim else None
        return TextOutput(last, penultimate, pooled, projected)


def _end_position(tokens: Tokens, eos_token_id: int) -> jax.Array:
    """Files written before transformers knew better say 2; their end token is the highest id of all."""
    return jnp.argmax(tokens if eos_token_id == 2 else tokens == eos_token_id, axis=1)


class VisionEmbeddings(nnx.Module):
    """Patch, class and position embeddings."""

    def __init__(self, config: CLIPVisionConfig, rngs: nnx.Rngs) -> None:
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (width,)) * width**-0.5)
        self.patch_embedding = nnx.Conv(
            3,
            width,
            kernel_size=(patch, patch),
            strides=(patch, patch),
            padding="VALID",
            use_bias=False,
            kernel_init=nnx.initializers.normal(0.02),
            dtype=config.dtype,
            rngs=rngs,
        )
        num_positions = (config.image_size // patch) ** 2 + 1
        self.position_embedding = _embed(num_positions, width, config.dtype, rngs)
        self.config = config

    def __call__(self, images: Images) -> Float[Array, "B N D"]:
        size = self.config.image_size
        if images.shape[1:3] != (size, size):
            raise ValueError(
                f"images are {images.shape[1:3]} pixels; this image tower takes {(size, size)}"
            )
        patches_BND = rearrange(self.patch_embedding(images), "B H W D -> B (H W) D")
        B, N, D = patches_BND.shape
        class_D = self.class_embedding[...].astype(patches_BND.dtype)
        class_B1D = jnp.broadcast_to(class_D[None, None], (B, 1, D))
        position_ND = self.position_embedding(jnp.arange(N + 1))
        return jnp.concatenate([class_B1D, patches_BND], axis=1) + position_ND[None]


class CLIPVision(nnx.Module):
    """Transformers' CLIPVisionModel, or CLIPVisionModelWithProjection where `projection_dim` is not 0."""

    def __init__(self, config: CLIPVisionConfig, rngs: nnx.Rngs) -> None:
        self.embeddings = VisionEmbeddings(config, rngs)
        self.pre_layrnorm = layer_norm(config, rngs)  # the name is misspelt in every weight file
        self.encoder = Encoder(config, rngs)
        self.post_layernorm = layer_norm(config, rngs)
        if config.projection_dim:
            self.visual_projection = _projection(config, config.projection_dim, rngs)
        self.config = config

    def __call__(self, images: Images) -> VisionOutput:
        """Encodes images as `preprocess` returns them."""
        last, _ = self.encoder(self.pre_layrnorm(self.embeddings(images)), causal=False)
        pooled = self.post_layernorm(last[:, 0])
        projected = self.visual_projection(pooled) if self.config.projection_dim else None
        return VisionOutput(last, pooled, projected)


def _projection(config: TowerConfig, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    width = config.hidden_size
    return _linear(width, outputs, width**-0.5, config.dtype, rngs, use_bias=False)


class CLIP(nnx.Module):
    """Transformers' CLIPModel: both towers, their projections into one space, and the temperature.

    It scores: in a network of float32 products are too, where a TPU would round their factors to bfloat16.
    """

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs) -> None:
        self.text_model = CLIPText(config.text, rngs)
        self.vision_model = CLIPVision(config.vision, rngs)
        self.text_projection = _projection(config.text, config.projection_dim, rngs)
        self.visual_projection = _projection(config.vision, config.projection_dim, rngs)
        self.logit_scale = nnx.Param(jnp.array(math.log(1 / 0.07), jnp.float32))

    def text_features(self, tokens: Tokens) -> Float[Array, "B P"]:
        """Captions in the shared space, not of unit norm."""
        with jax.default_matmul_precision("highest"):
            return self.text_projection(self.text_model(tokens).pooled)

    def image_features(self, images: Images) -> Float[Array, "B P"]:
        """Images, as `preprocess` returns them, in the shared space, not of unit norm."""
        with jax.default_matmul_precision("highest"):
            return self.visual_projection(self.vision_model(images).pooled)

    def __call__(self, images: Images, tokens: Tokens) -> Float[Array, "B B"]:
        """Logits `[images, captions]`: cosines over the temperature, figure 3 of the paper."""
        image, text = unit_norm(self.image_features(images)), unit_norm(self.text_features(tokens))
        with jax.default_matmul_precision("highest"):
            return jnp.exp(self.logit_scale[...]) * image @ text.T


def unit_norm(features: Float[Array, "B P"]) -> Float[Array, "B P"]:
    """Features divided by their Euclidean norm, in float32."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def preprocess(
    images: Images,
    size: int,
    mean: tuple[float, float, float] = MEAN,
    std: tuple[float, float, float] = STD,
) -> Float[Array, "B size size 3"]:
    """Images in [-1, 1] -> what an image tower takes, on the device.

    The shorter side is resized to `size` pixels (bicubic, antialiased, as Pillow does, but not rounded to
    8 bits), the middle square is cut out, and the channels are normalised by `mean` and `std`, which hold for [0, 1].
    """
    B, rows, columns, channels = images.shape
    short = min(rows, columns)
    if short != size:
        shape = (B, size * rows // short, size * columns // short, channels)
        images = jnp.clip(jax.image.resize(images, shape, "cubic", antialias=True), -1, 1)
    top, left = ((side - size) // 2 for side in images.shape[1:3])
    images = images[:, top : top + size, left : left + size]
    mean, std = (jnp.array(channels)[None, None, None] for channels in (mean, std))
    return (images * 0.5 + 0.5 - mean) / std
