"""What a U-ViT is made of."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ldm_jax.models.computation import PRECISIONS, REMAT
from ldm_jax.models.json_files import check_known, fields_of, typed
from ldm_jax.models.names import Names, check_fixed
from ldm_jax.settings.fields import NOTHING, check_fields, one_of, setting

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

    # channels of the noisy latent, and of what is concatenated to it
    in_channels: int = setting(4, within="[1, inf)")
    out_channels: int = setting(4, within="[1, inf)")  # channels of the prediction
    width: int = setting(2048, within="[1, inf)")  # width of a token
    # transformer blocks, even; one more stands in the middle
    depth: int = setting(42, within="[2, inf)")
    num_heads: int = setting(16, within="[1, inf)")  # attention heads
    # width of the feed-forward layers, as a multiple of a token's
    mlp_ratio: int = setting(4, within="[1, inf)")
    # rows and columns of the latent that make one token
    patch_size: int = setting(2, within="[1, inf)")
    text_width: int = setting(1024, within="[1, inf)")  # width of the text encoder's tokens
    text_length: int = setting(77, within="[1, inf)")  # text tokens that there are positions for
    # side of the latents that the positions are learned for
    sample_size: int = setting(32, within="[1, inf)")
    # of the computation; train.precision sets it
    dtype: str = one_of(PRECISIONS, "float32", decides=NOTHING)
    # what is recomputed in the backward pass
    remat: str = one_of(REMAT, "none", decides=NOTHING)
    pooled_width: ClassVar[int] = 0  # the pooled text does not condition it

    def __post_init__(self) -> None:
        check_fields(self)
        if self.depth % 2:
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
