"""What a PixArt transformer is made of, and how diffusers says the same."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ldm_jax.models import names
from ldm_jax.models.computation import PRECISIONS, REMAT
from ldm_jax.models.json_files import typed
from ldm_jax.settings.fields import NOTHING, check_fields, one_of, setting

EPSILON = 1e-6
SINUSOIDS = 256  # of the time, and of each number that tells the size

# What diffusers lets a config choose and this network has built in.
FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_eps": EPSILON,
    "norm_type": "ada_norm_single",
    "upcast_attention": False,
}
# Diffusers' names, types and defaults of the rest.
FIELDS = {
    "in_channels": (int, 4),
    "out_channels": (int | None, 8),
    "num_attention_heads": (int, 16),
    "attention_head_dim": (int, 72),
    "num_layers": (int, 28),
    "patch_size": (int, 2),
    "caption_channels": (int | None, None),
    "sample_size": (int, 128),
    "interpolation_scale": (float | None, None),
    "use_additional_conditions": (bool | None, None),
}


@dataclasses.dataclass(frozen=True)
class PixArtConfig:
    """A PixArt transformer; the defaults are those of PixArt-alpha's XL/2 at 512 pixels.

    The released networks predict the noise and, in as many further channels, its variance, which a sampler
    does not use: `out_channels` counts both, the network returns the first `in_channels` of them.

    Raises ValueError for sizes that do not fit each other.
    """

    # channels of the noisy latent, and of the prediction that is returned
    in_channels: int = setting(4, within="[1, inf)")
    # channels of the last projection; those after in_channels are not used
    out_channels: int = setting(8, within="[1, inf)")
    width: int = setting(1152, within="[1, inf)")  # width of the tokens
    depth: int = setting(28, within="[1, inf)")  # transformer blocks
    num_heads: int = setting(16, within="[1, inf)")  # attention heads of each block
    # rows and columns of the latent that make one token
    patch_size: int = setting(2, within="[1, inf)")
    text_width: int = setting(4096, within="[1, inf)")  # width of the text encoder's tokens
    caption_mlp: bool = True  # two layers from the text to the width; else text_width is the width
    # side of the latents; positions in others are spread over the same range
    sample_size: int = setting(64, within="[1, inf)")
    # divides positions; 0: sample_size // 64, at least 1
    interpolation_scale: float = setting(0.0, within="[0, inf)")
    size_conditioning: bool = False  # the network is told height and width, as at 1024 pixels
    # of the computation; train.precision sets it
    dtype: str = one_of(PRECISIONS, "float32", decides=NOTHING)
    # what is recomputed in the backward pass
    remat: str = one_of(REMAT, "none", decides=NOTHING)
    pooled_width: ClassVar[int] = 0  # the pooled text does not condition it

    def __post_init__(self) -> None:
        check_fields(self)
        parts = {"heads": self.num_heads, "sines and cosines of rows and columns": 4}
        if self.size_conditioning:
            parts["embeddings of height, width and aspect ratio"] = 3
        for name, count in parts.items():
            if self.width % count:
                raise ValueError(f"width {self.width} cannot be divided into {count} {name}")
        if not self.caption_mlp and self.text_width != self.width:
            raise ValueError(
                f"without a caption_mlp text_width must be the width, {self.width}; it is {self.text_width}"
            )
        if self.out_channels < self.in_channels:
            raise ValueError(
                f"out_channels {self.out_channels} must not be less than in_channels {self.in_channels}"
            )

    @property
    def predicted_channels(self) -> int:
        """Channels of what the network returns."""
        return self.in_channels

    @property
    def multiple(self) -> int:
        """What the rows and columns of latents are multiples of."""
        return self.patch_size

    @property
    def names(self) -> names.Names:
        """How checkpoints name the parameters."""
        return names.PIXART

    @property
    def base(self) -> float:
        """The position, of rows and of columns alike, at which every grid of patches ends."""
        scale = self.interpolation_scale or max(self.sample_size // 64, 1)
        return self.sample_size // self.patch_size / scale

    @classmethod
    def from_diffusers(
        cls, values: Mapping[str, Any], dtype: str = "float32", remat: str = "none"
    ) -> "PixArtConfig":
        """From the content of a `config.json` of diffusers' PixArtTransformer2DModel.

        Raises ValueError where it asks for something that this network does not have.
        """
        given = typed(values, FIELDS)
        width = given["num_attention_heads"] * given["attention_head_dim"]
        text_width, told_sizes = given["caption_channels"], given["use_additional_conditions"]
        fixed = {**FIXED, "cross_attention_dim": width}
        names.check_fixed(values, fixed, "PixArtTransformer2DModel")
        return cls(
            in_channels=given["in_channels"],
            out_channels=given["out_channels"] or given["in_channels"],
            width=width,
            depth=given["num_layers"],
            num_heads=given["num_attention_heads"],
            patch_size=given["patch_size"],
            text_width=text_width or width,
            caption_mlp=text_width is not None,
            sample_size=given["sample_size"],
            interpolation_scale=given["interpolation_scale"] or 0.0,
            size_conditioning=given["sample_size"] == 128 if told_sizes is None else told_sizes,
            dtype=dtype,
            remat=remat,
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The content of the `config.json` that diffusers' PixArtTransformer2DModel reads."""
        return {
            "_class_name": "PixArtTransformer2DModel",
            **FIXED,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "num_attention_heads": self.num_heads,
            "attention_head_dim": self.width // self.num_heads,
            "cross_attention_dim": self.width,
            "num_layers": self.depth,
            "patch_size": self.patch_size,
            "caption_channels": self.text_width if self.caption_mlp else None,
            "sample_size": self.sample_size,
            "interpolation_scale": self.interpolation_scale or None,
            "use_additional_conditions": self.size_conditioning,
        }
