"""What a U-ViT is made of."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ldm_jax.models.json_files import check_known, fields_of, typed
from ldm_jax.models.names import Names, check_fixed

EPSILON = 1e-5
CLASS = {"_class_name": "UViT"}


@dataclasses.dataclass(frozen=True)
class UViTConfig:
    """A U-ViT; the defaults are the 2.3 B parameters of Li et al. 2024 (arXiv:2412.12391) at 256 pixels.

    `depth` is the authors': a half of the blocks comes before the middle one, a half after it, and the middle one is
    not counted. So a network that their paper says has 13 layers is of depth 12. `dtype` is that of the computation,
    `remat` a row of `nn.stack.REMAT` that holds for every block alone.

    Raises ValueError for sizes that do not fit each other.
    """

    in_channels: int = 4  # channels of the noisy latent, and of what is concatenated to it
    out_channels: int = 4  # channels of the prediction
    width: int = 2048  # width of a token
    depth: int = 42  # transformer blocks, even; one more stands in the middle
    num_heads: int = 16  # attention heads
    mlp_ratio: int = 4  # width of the feed-forward layers, as a multiple of a token's
    patch_size: int = 2  # rows and columns of the latent that make one token
    text_width: int = 1024  # width of the text encoder's tokens
    text_length: int = 77  # text tokens that there are positions for
    sample_size: int = 32  # side of the latents that the positions are learned for
    dtype: str = "float32"  # of the computation; train.precision sets it
    remat: str = "none"  # what is recomputed in the backward pass: none, full, dots
    pooled_width: ClassVar[int] = 0  # the pooled text does not condition it

    def __post_init__(self) -> None:
        if self.depth < 2 or self.depth % 2:
            raise ValueError(
                f"depth is {self.depth}; it is even and at least 2, a half of it on each side of the middle block"
            )
        for divided, part in (("width", "num_heads"), ("sample_size", "patch_size")):
            whole, parts = getattr(self, divided), getattr(self, part)
            if whole % parts:
                raise ValueError(f"{divided} {whole} is not a multiple of {part} {parts}")

    @property
    def predicted_channels(self) -> int:
        """Channels of what the network returns."""
        return self.out_channels

    @property
    def multiple(self) -> int:
        """What the rows and columns of latents are multiples of."""
        return self.patch_size

    @property
    def names(self) -> Names:
        """How checkpoints name the parameters: as their paths say."""
        return Names()

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], dtype: str = "float32", remat: str = "none"
    ) -> "UViTConfig":
        """From the content of a `config.json`. Raises ValueError for one of another class."""
        check_fixed(values, CLASS, "a U-ViT")
        fields = fields_of(cls)
        check_known(values, {**CLASS, **fields}, "a U-ViT")
        return cls(**typed(values, fields), dtype=dtype, remat=remat)

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`: what the network is, not how it is computed."""
        values = dataclasses.asdict(self)
        del values["dtype"], values["remat"]
        return {**CLASS, **values}
