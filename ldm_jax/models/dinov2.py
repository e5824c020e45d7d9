"""DINOv2's image tower (Oquab et al. 2023, arXiv:2304.07193), as transformers lays it out.

Attributes carry the names that released files have, so parameter paths translate mechanically (`models/names.py`):
`encoder/layer/block/mlp/fc1/kernel` is `encoder.layer.{i}.mlp.fc1.weight`. The authors' file has other names, which
are read too. Its class token is the feature of FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675), for which they take the
large model, ViT-L/14.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from ldm_jax.models import clip
from ldm_jax.models.json_files import fields_of, typed
from ldm_jax.models.names import Names, check_fixed
from ldm_jax.nn.attention import attention
from ldm_jax.nn.layers import from_heads, gelu, into_heads, linear
from ldm_jax.nn.stack import Stack
from ldm_jax.types import Arr, Images

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, for images in [0, 1]
STD = (0.229, 0.224, 0.225)

# What transformers lets a config choose and this network has built in.
FIXED = {"num_channels": 3, "hidden_act": "gelu"}
NAMES = Names(
    renames=(
        ("query", "attention.query"),
        ("key", "attention.key"),
        ("value", "attention.value"),
        ("dense", "output.dense"),
    ),
    legacy=(  # the authors' names, of queries, keys and values that `originals` has told apart
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^blocks\.", "encoder.layer."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.", ".attention.attention."),
        (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
        (r"\.mlp\.w12\.", ".mlp.weights_in."),
        (r"\.mlp\.w3\.", ".mlp.weights_out."),
        (r"^norm\.", "layernorm."),
    ),
    unused=(r"^(embeddings\.)?mask_token$",),  # for pretraining alone
)


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """Fields and their defaults are transformers', but for `dtype`, which is that of the computation.

    `image_size` is the side, in pixels, of the images that the position embeddings were trained on: 518 in all that
    was released. Images may have other sides. Raises ValueError for heads that do not divide the width, and for
    images smaller than a patch.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 14
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    use_swiglu_ffn: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is less than patch_size {self.patch_size}"
            )

    @classmethod
    def from_transformers(cls, values: Mapping[str, Any], dtype: str = "float32") -> "Dinov2Config":
        """From the content of a `config.json` of transformers' Dinov2Model.

        Raises ValueError where it asks for something that this network does not have.
        """
        check_fixed(values, FIXED, "Dinov2Model")
        return cls(**typed(values, fields_of(cls), free=["layerscale_value"]), dtype=dtype)

    def to_transformers(self) -> dict[str, Any]:
        """The content of the `config.json` that transformers' Dinov2Model reads."""
        values = dataclasses.asdict(self)
        del values["dtype"]
        names = {"architectures": ["Dinov2Model"], "model_type": "dinov2"}
        return {**names, **FIXED, "use_mask_token": False, **values}

    @property
    def names(self) -> Names:
        """How checkpoints name the parameters."""
        return NAMES

    @property
    def side(self) -> int:
        """Patches in a row and in a column of the images that it was trained on."""
        return self.image_size // self.patch_size


def _linear(
    inputs: int, outputs: int, config: Dinov2Config, rngs: nnx.Rngs, use_bias: bool = True
) -> nnx.Linear:
    init = nnx.initializers.normal(0.02)
    return linear(
        inputs, outputs, use_bias=use_bias, kernel_init=init, dtype=config.dtype, rngs=rngs
    )


class Attention(nnx.Module):
    """Self-attention of one layer."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.query, self.key, self.value = (
            _linear(width, width, config, rngs, config.qkv_bias) for _ in range(3)
        )
        self.dense = _linear(width, width, config, rngs)
        self.num_heads = config.num_attention_heads

    def __call__(self, x_BND: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        q, k, v = (
            into_heads(layer, x_BND, self.num_heads) for layer in (self.query, self.key, self.value)
        )
        return from_heads(self.dense, attention(q, k, v))


class MLP(nnx.Module):
    """The feed-forward part of a layer."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs) -> None:
        width, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.fc1 = _linear(width, inner, config, rngs)
        self.fc2 = _linear(inner, width, config, rngs)

    def __call__(self, x_BND: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        return self.fc2(gelu(self.fc1(x_BND)))


class SwiGLU(nnx.Module):
    """The feed-forward part of a layer of the giant model (Shazeer 2020, arXiv:2002.05202, equation 6).

    Its inner width is two thirds of the MLP's, which makes as many parameters, rounded up to a multiple of 8.
    """

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        inner = -(-int(int(width * config.mlp_ratio) * 2 / 3) // 8) * 8
        self.weights_in = _linear(width, 2 * inner, config, rngs)
        self.weights_out = _linear(inner, width, config, rngs)

    def __call__(self, x_BND: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        gate, up = jnp.split(self.weights_in(x_BND), 2, axis=-1)
        return self.weights_out(nnx.silu(gate) * up)


class LayerScale(nnx.Module):
    """A learned factor for each channel (Touvron et al. 2021, arXiv:2103.17239, equation 4)."""

    def __init__(self, config: Dinov2Config) -> None:
        self.lambda1 = nnx.Param(jnp.full((config.hidden_size,), config.layerscale_value))

    def __call__(self, x_BND: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        return x_BND * self.lambda1[...].astype(x_BND.dtype)[None, None]


class Layer(nnx.Module):
    """A pre-norm transformer layer, whose branches are scaled."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs) -> None:
        self.norm1 = clip.layer_norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.layer_scale1 = LayerScale(config)
        self.norm2 = clip.layer_norm(config, rngs)
        self.mlp = (SwiGLU if config.use_swiglu_ffn else MLP)(config, rngs)
        self.layer_scale2 = LayerScale(config)

    def __call__(self, x_BND: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        x_BND += self.layer_scale1(self.attention(self.norm1(x_BND)))
        return x_BND + self.layer_scale2(self.mlp(self.norm2(x_BND)))


class Encoder(nnx.Module):
    """The layers of the tower."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs) -> None:
        self.layer = Stack(lambda rngs: Layer(config, rngs), config.num_hidden_layers, rngs)

    def __call__(self, x_BND: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        return self.layer(x_BND)


class PatchEmbeddings(nnx.Module):
    """Patches to tokens; pixels that fill no patch, at the lower and right edge, are not seen."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs) -> None:
        patch = (config.patch_size, config.patch_size)
        self.projection = nnx.Conv(
            3,
            config.hidden_size,
            kernel_size=patch,
            strides=patch,
            padding="VALID",
            kernel_init=nnx.initializers.normal(0.02),
            dtype=config.dtype,
            rngs=rngs,
        )

    def __call__(self, images: Images) -> Float[Array, "B H W D"]:
        return self.projection(images)


class Embeddings(nnx.Module):
    """Patch, class and position embeddings."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs) -> None:
        init, width = nnx.initializers.normal(0.02), config.hidden_size
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, width)))
        self.position_embeddings = nnx.Param(init(rngs.params(), (1, config.side**2 + 1, width)))
        self.patch_embeddings = PatchEmbeddings(config, rngs)
        self.side = config.side

    def __call__(self, images: Images) -> Float[Array, "B N D"]:
        patches_BHWD = self.patch_embeddings(images)
        B, H, W, D = patches_BHWD.shape
        class_111D, trained = jnp.split(self.position_embeddings[...][:, None], [1], axis=2)
        trained_HWD = rearrange(trained, "1 1 (H W) D -> H W D", H=self.side)
        position_HWD = interpolate(trained_HWD, (H, W)).astype(patches_BHWD.dtype)
        patches_BND = rearrange(patches_BHWD + position_HWD[None], "B H W D -> B (H W) D")
        class_11D = (self.cls_token[...] + class_111D[0]).astype(patches_BND.dtype)
        return jnp.concatenate([jnp.broadcast_to(class_11D, (B, 1, D)), patches_BND], axis=1)


def interpolate(positions: Float[Arr, "h w D"], grid: tuple[int, int]) -> Float[Array, "H W D"]:
    """Position embeddings for another grid of patches: bicubic, not antialiased, as transformers has it.

    Past an edge the embeddings are those of the edge, where `jax.image.resize` would leave them out.
    """
    if positions.shape[:2] == grid:
        return positions
    reach = 2  # a cubic kernel's, in patches
    scale = jnp.array(grid, jnp.float32) / jnp.array(positions.shape[:2], jnp.float32)
    return jax.image.scale_and_translate(
        jnp.pad(positions, ((reach, reach), (reach, reach), (0, 0)), mode="edge"),
        (*grid, positions.shape[2]),
        (0, 1),
        scale,
        -reach * scale,
        "cubic-pytorch",
        antialias=False,
    )


class Dinov2(nnx.Module):
    """Transformers' Dinov2Model, of which the class token is the output."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs) -> None:
        self.embeddings = Embeddings(config, rngs)
        self.encoder = Encoder(config, rngs)
        self.layernorm = clip.layer_norm(config, rngs)
        self.patch_size = config.patch_size

    def __call__(self, images: Images) -> Float[Array, "B D"]:
        """The class token after the last norm, float32, of images as `preprocess` returns them.

        In a network of float32 products are too, where a TPU would round their factors to bfloat16. Raises ValueError
        for images without a patch.
        """
        if min(images.shape[1:3]) < self.patch_size:
            raise ValueError(
                f"images are {images.shape[1:3]} pixels; the patches of this network take {self.patch_size}"
            )
        with jax.default_matmul_precision("highest"):
            tokens_BND = self.encoder(self.embeddings(images))
        return self.layernorm(tokens_BND[:, 0]).astype(jnp.float32)


def preprocess(images: Images, size: int = 224) -> Float[Array, "B {size} {size} 3"]:
    """Images in [-1, 1] -> what the network takes, on the device.

    They are resized to `size` x `size` pixels, whatever their shape (bicubic, antialiased, as Pillow does, but not
    rounded to 8 bits), and normalised by ImageNet's mean and deviation, as for FD-DINOv2.
    """
    shape = (len(images), size, size, 3)
    images = jnp.clip(jax.image.resize(images, shape, "cubic", antialias=True), -1, 1)
    return clip.preprocess(images, size, MEAN, STD)
