"""What a UNet of latent diffusion is made of, and how diffusers says the same."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm_jax.models import names
from ldm_jax.models.computation import PRECISIONS, REMAT
from ldm_jax.models.json_files import typed
from ldm_jax.settings.fields import NOTHING, check_fields, one_of, setting

EPSILON = 1e-5

# What diffusers lets a config choose and this network has built in.
FIXED = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": EPSILON,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}

# What follows from the rest, and is compared with it.
FOLLOWS = (
    "down_block_types",
    "mid_block_type",
    "up_block_types",
    "resnet_time_scale_shift",
    "addition_embed_type",
)

# Diffusers' names, types and defaults of the rest.
FIELDS = {
    "in_channels": (int, 4),
    "out_channels": (int, 4),
    "block_out_channels": (tuple[int, ...], (320, 640, 1280, 1280)),
    "down_block_types": (tuple[str, ...], ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)),
    "mid_block_type": (str | None, "UNetMidBlock2DCrossAttn"),
    "layers_per_block": (int | tuple[int, ...], 2),
    "transformer_layers_per_block": (int | tuple[int, ...], 1),
    "attention_head_dim": (int | tuple[int, ...], 8),
    "cross_attention_dim": (int, 1280),
    "norm_num_groups": (int, 32),
    "use_linear_projection": (bool, False),
    "sample_size": (int | None, None),
    "addition_embed_type": (str | None, None),
    "addition_time_embed_dim": (int | None, None),
    "projection_class_embeddings_input_dim": (int | None, None),
}

# SDXL's refiner, which is told of five numbers and not of six, has the config of a network with other texts.
REFINER = {
    "cross_attention_dim": 1280,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 5 * 256,
}

# What diffusers says once for all levels, or for each.
BY_LEVEL = (
    "down_block_types",
    "layers_per_block",
    "transformer_layers_per_block",
    "attention_head_dim",
)

STABLE_DIFFUSION, DEEPFLOYD = "stable_diffusion", "deepfloyd"


class Blocks(NamedTuple):
    """What diffusers calls the blocks of one family."""

    plain: str
    attending: str
    middle: str
    time: str  # how a residual block takes the time


BLOCKS = {
    STABLE_DIFFUSION: Blocks(
        "DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "default"
    ),
    DEEPFLOYD: Blocks(
        "ResnetDownsampleBlock2D",
        "SimpleCrossAttnDownBlock2D",
        "UNetMidBlock2DSimpleCrossAttn",
        "scale_shift",
    ),
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """A UNet by level, from the highest resolution to the lowest; the defaults are Stable Diffusion 2's.

    `blocks` is a row of BLOCKS: Stable Diffusion's, or those of DeepFloyd IF, where the time scales and shifts a
    residual block, such blocks also halve and double the map, and one attention to the text and the image at once
    (no feed-forward layer) follows each. `transformer_depth` counts the transformer blocks after each residual
    block of a level, `mid_depth` those in the middle; 0 is no attention, and IF has at most 1. A `mid_depth` of None
    is a network without a middle block, as BK-SDM has it (Kim et al. 2023, arXiv:2305.15798). Heads are
    `head_width` wide; or there are `num_heads` of them at every level, where that is not 0. `sample_size`, the
    side of the latents, is what diffusers renders by default. `use_linear_projection` says how checkpoints hold
    the projections around a transformer: as linear layers, or as 1x1 convolutions. `dtype` is that of the
    computation, `remat` a row of `nn.stack.REMAT` that holds for every residual and every transformer block alone.
    """

    # channels of the noisy latent, and of what is concatenated to it
    in_channels: int = setting(4, within="[1, inf)")
    out_channels: int = setting(4, within="[1, inf)")  # channels of the prediction
    blocks: str = one_of(BLOCKS, STABLE_DIFFUSION)  # whose they are
    # width of each level
    channels: tuple[int, ...] = setting((320, 640, 1280, 1280), within="[1, inf)", count="[1, inf)")
    # residual blocks a level; one more on the way up
    num_res_blocks: int = setting(2, within="[1, inf)")
    # transformer blocks after each residual block of a level; 0: no attention
    transformer_depth: tuple[int, ...] = setting((1, 1, 1, 0), within="[0, inf)", count="[1, inf)")
    # transformer blocks in the middle; none: there is no middle block
    mid_depth: int | None = setting(1, within="[0, inf)")
    head_width: int = setting(64, within="[1, inf)")  # width of an attention head
    # heads at every level, in place of head_width; 0: as many as fit
    num_heads: int = setting(0, within="[0, inf)")
    text_width: int = setting(1024, within="[1, inf)")  # width of the text encoder's tokens
    # width of the pooled text that conditions with six sizes (SDXL); 0: neither does
    pooled_width: int = setting(0, within="[0, inf)")
    size_width: int = setting(256, within="[2, inf)")  # sinusoids that tell each of the six sizes
    num_groups: int = setting(32, within="[1, inf)")  # of the group norms
    use_linear_projection: bool = (
        True  # how checkpoints hold the projections around a transformer; else as 1x1 convolutions
    )
    # side of the latents, which diffusers renders by default
    sample_size: int = setting(64, within="[1, inf)")
    # of the computation; train.precision sets it
    dtype: str = one_of(PRECISIONS, "float32", decides=NOTHING)
    # what is recomputed in the backward pass
    remat: str = one_of(REMAT, "none", decides=NOTHING)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.blocks == DEEPFLOYD and max(depth for _, depth in self.depths()) > 1:
            raise ValueError(
                f"transformer_depth is {self.transformer_depth}, mid_depth {self.mid_depth}; blocks of {DEEPFLOYD} "
                "have one attention (1) or none (0)"
            )
        if len(self.channels) != len(self.transformer_depth):
            raise ValueError(
                f"channels {self.channels} and transformer_depth {self.transformer_depth} are by level"
                " and must be of one length"
            )
        widths = {width for width, depth in self.depths() if depth}
        uneven = sorted(width for width in widths if width % (self.num_heads or self.head_width))
        if uneven:
            heads = f"{self.num_heads} heads" if self.num_heads else f"heads of {self.head_width}"
            raise ValueError(f"a level of {uneven[0]} channels cannot be divided into {heads}")

    def heads(self, width: int) -> int:
        """How many attention heads a level of `width` channels has."""
        return self.num_heads or max(1, width // self.head_width)

    @property
    def predicted_channels(self) -> int:
        """Channels of what the network returns."""
        return self.out_channels

    @property
    def multiple(self) -> int:
        """What the rows and columns of latents are multiples of."""
        return 2 ** (len(self.channels) - 1)

    @property
    def time_width(self) -> int:
        """Width of the embedded time."""
        return 4 * self.channels[0]

    @property
    def added_width(self) -> int:
        """Width of what `add_embedding` takes: the pooled text and the sizes."""
        return self.pooled_width + 6 * self.size_width

    @property
    def names(self) -> names.Names:
        """How checkpoints name the parameters."""
        return names.UNET_LINEAR if self.use_linear_projection else names.UNET_CONV

    @classmethod
    def from_diffusers(
        cls, values: Mapping[str, Any], dtype: str = "float32", remat: str = "none"
    ) -> "UNetConfig":
        """From the content of a `config.json` of diffusers' UNet2DConditionModel.

        Raises ValueError where it asks for something that this network does not have.
        """
        where = "UNet2DConditionModel"
        names.check_fixed(values, FIXED, where)
        given = typed(values, FIELDS)
        channels = given["block_out_channels"]
        down, sizes, depths, heads = (_by_level(given, name) for name in BY_LEVEL)
        depth = tuple(
            d if "CrossAttn" in block else 0 for d, block in zip(depths, down, strict=True)
        )
        blocks = DEEPFLOYD if down[0] in BLOCKS[DEEPFLOYD] else STABLE_DIFFUSION
        config = cls(
            in_channels=given["in_channels"],
            out_channels=given["out_channels"],
            blocks=blocks,
            channels=channels,
            num_res_blocks=sizes[0],
            transformer_depth=depth,
            mid_depth=_mid_depth(given["mid_block_type"], depths[-1]),
            **_heads(heads, channels, blocks),
            text_width=given["cross_attention_dim"],
            **_added(given),
            num_groups=given["norm_num_groups"],
            use_linear_projection=given["use_linear_projection"],
            sample_size=given["sample_size"] or 64,
            dtype=dtype,
            remat=remat,
        )
        written = config.to_diffusers()
        names.check_fixed(values, {name: written[name] for name in FOLLOWS}, where)
        same = {"layers_per_block": sizes[:1] * len(sizes)}
        names.check_fixed({"layers_per_block": sizes}, same, where)
        return config

    def to_diffusers(self) -> dict[str, Any]:
        """The content of the `config.json` that diffusers' UNet2DConditionModel reads.

        Raises ValueError for a middle whose depth diffusers cannot express.
        """
        depths = [max(depth, 1) for depth in self.transformer_depth]
        if self.mid_depth and self.transformer_depth[-1] not in (0, self.mid_depth):
            raise ValueError(
                f"diffusers has one depth for the middle and the lowest level; here they are"
                f" {self.mid_depth} and {self.transformer_depth[-1]}"
            )
        if self.mid_depth:
            depths[-1] = self.mid_depth
        blocks = BLOCKS[self.blocks]
        down = [blocks.attending if depth else blocks.plain for depth in self.transformer_depth]
        heads = [self.heads(width) for width in self.channels]
        if self.blocks == DEEPFLOYD:
            heads = [width // count for width, count in zip(self.channels, heads, strict=True)]
        return {
            "_class_name": "UNet2DConditionModel",
            **FIXED,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": list(self.channels),
            "layers_per_block": self.num_res_blocks,
            "transformer_layers_per_block": depths,
            "attention_head_dim": heads,  # which it is called, but for IF is their number
            "cross_attention_dim": self.text_width,
            "norm_num_groups": self.num_groups,
            "use_linear_projection": self.use_linear_projection,
            "sample_size": self.sample_size,
            "down_block_types": down,
            "mid_block_type": self._middle(blocks.middle),
            "up_block_types": [block.replace("Down", "Up") for block in reversed(down)],
            "resnet_time_scale_shift": blocks.time,
            **self._added(),
        }

    def _middle(self, attending: str) -> str | None:
        if self.mid_depth is None:
            return None
        return attending if self.mid_depth else "UNetMidBlock2D"

    def _added(self) -> dict[str, Any]:
        if not self.pooled_width:
            return {"addition_embed_type": None, "addition_time_embed_dim": None}
        return {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": self.size_width,
            "projection_class_embeddings_input_dim": self.added_width,
        }

    def depths(self) -> list[tuple[int, int]]:
        """(channels, transformer depth) of every level, and of the middle."""
        levels = zip(self.channels, self.transformer_depth, strict=True)
        return [*levels, (self.channels[-1], self.mid_depth or 0)]


def _by_level(given: Mapping[str, Any], name: str) -> list[Any]:
    value, levels = given[name], len(given["block_out_channels"])
    values = list(value) if isinstance(value, tuple) else [value] * levels
    if len(values) != levels:
        raise ValueError(f"{name} is {values}, and block_out_channels has {levels} levels")
    return values


def _mid_depth(kind: str | None, depth: int) -> int | None:
    if kind is None:
        return None
    return depth if kind.endswith("CrossAttn") else 0


def _added(given: Mapping[str, Any]) -> dict[str, int]:
    if given["addition_embed_type"] != "text_time":
        return {}
    if all(given[name] == value for name, value in REFINER.items()):
        raise ValueError(
            "SDXL's refiner is not supported: it is told of five numbers, one of them an aesthetic score;"
            " only networks that are told of six sizes are, such as SDXL's base"
        )
    size_width = given["addition_time_embed_dim"] or 0
    pooled_width = (given["projection_class_embeddings_input_dim"] or 0) - 6 * size_width
    if not size_width or pooled_width < 1:
        raise ValueError(
            "addition_embed_type 'text_time' takes an addition_time_embed_dim and a"
            " projection_class_embeddings_input_dim of more than 6 times as much; they are"
            f" {given['addition_time_embed_dim']} and {given['projection_class_embeddings_input_dim']}"
        )
    return {"pooled_width": pooled_width, "size_width": size_width}


def _heads(counts: list[int], channels: tuple[int, ...], blocks: str) -> dict[str, int]:
    """`attention_head_dim`, which by an old mistake of diffusers' holds the number of heads, but not for IF."""
    if any(count > width for width, count in zip(channels, counts, strict=True)):
        raise ValueError(
            f"attention_head_dim={counts} is more than block_out_channels={list(channels)}"
        )
    if blocks == DEEPFLOYD:
        counts = [width // size for width, size in zip(channels, counts, strict=True)]
    elif len(set(counts)) == 1:
        return {"num_heads": counts[0]}
    widths = {width // count for width, count in zip(channels, counts, strict=True)}
    if len(widths) > 1:
        raise ValueError(
            f"attention_head_dim={counts} with block_out_channels={list(channels)}: neither the number"
            " of heads nor their width is the same at all levels"
        )
    return {"head_width": widths.pop()}
