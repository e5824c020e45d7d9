"""The backbones of the papers, and those that were released, by name; and sizes in between, by their cost.

A is "Bigger is not Always Better" (arXiv:2404.01367), B "On the Scalability of Diffusion-based Text-to-Image
Generation" (arXiv:2404.02883), C its follow-up on transformers (arXiv:2412.12391). Each size stands beside what its
source prints of it.
"""

import contextlib
import dataclasses
import difflib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from ldm_jax.models.flops import Count, count
from ldm_jax.models.pixart_config import PixArtConfig
from ldm_jax.models.unet_config import DEEPFLOYD, UNetConfig
from ldm_jax.models.uvit_config import UViTConfig

_log = logging.getLogger(__name__)

Number = int | float

# What a size may be asked for by.
TARGETS: dict[str, Callable[[Count], Number]] = {
    "params": lambda count: count.total.params,
    "flops": lambda count: count.total.flops,
}
# What the papers count: A the products of queries, keys and values as well, B not.
UNITS: dict[str, Callable[[Count], Number]] = {
    "GFLOPs": lambda count: count.total.flops / 1e9,
    "GMACs": lambda count: count.total.macs / 1e9,
}
WIDTH_STEP, MAX_WIDTH = 32, 16_384


@dataclasses.dataclass(frozen=True)
class Size:
    """A backbone, and what its source prints of it: 0 where it prints nothing."""

    config: Any
    source: str
    params: Number = 0  # millions
    cost: Number = 0  # of a forward pass, in `unit`
    unit: str = "GMACs"  # a row of UNITS
    text_tokens: int = 77
    note: str = ""

    def count(self) -> Count:
        """What it costs by our count, at the size of latents and text that its source has."""
        return count(self.config, text_tokens=self.text_tokens)


def _a(c: int, params: Number, gflops: Number, note: str = "") -> Size:
    """Stable Diffusion's layout at another width; a text width of 1024 fits every row, the heads are not said."""
    config = UNetConfig(channels=(c, 2 * c, 4 * c, 4 * c), num_heads=8)
    return Size(config, "A, table 1", params, gflops, "GFLOPs", note=note)


def _b(params: Number, gmacs: Number, note: str = "", **fields: Any) -> Size:
    """At 256 pixels, 77 tokens of width 1024."""
    return Size(UNetConfig(**fields, sample_size=32), "B, table 1", params, gmacs, note=note)


def _sd2(c: int, params: Number, gmacs: Number) -> Size:
    return _b(params, gmacs, channels=(c, 2 * c, 4 * c, 4 * c))


def _if_xl(c: int, params: Number, gmacs: Number) -> Size:
    channels = (c, 2 * c, 3 * c, 4 * c)
    note = "DeepFloyd IF's blocks, inferred from the printed costs"
    return _b(params, gmacs, note, blocks=DEEPFLOYD, channels=channels, num_res_blocks=3)


def _sdxl(c: int, depth: tuple[int, int], params: Number, gmacs: Number) -> Size:
    """SDXL's layout without its added conditioning; the middle is as deep as the lowest level."""
    channels, (first, second) = (c, 2 * c, 4 * c), depth
    return _b(
        params, gmacs, channels=channels, transformer_depth=(0, first, second), mid_depth=second
    )


def _pixart(
    width: int, depth: int, params: Number, gmacs: Number, note: str = "", **fields: Any
) -> Size:
    config = PixArtConfig(width=width, depth=depth, sample_size=32, **fields)
    return Size(config, "B, table 2", params, gmacs, note=note)


def _uvit(width: int) -> Size:
    return Size(UViTConfig(width=width), "C", note="C prints only width, depth and heads")


_SDXL = UNetConfig(
    channels=(320, 640, 1280),
    transformer_depth=(0, 2, 10),
    mid_depth=10,
    text_width=2048,
    pooled_width=1280,
    sample_size=128,
)


SIZES = {
    "unet-39m": _a(64, 39, 25.3, "its 25.3 GFLOPs contradict its own normalised cost of 0.07"),
    "unet-83m": _a(96, 83, 102.7),
    "unet-145m": _a(128, 145, 161.5),
    "unet-223m": _a(160, 223, 233.5),
    "unet-318m": _a(192, 318, 318.5),
    "unet-430m": _a(224, 430, 416.6),
    "unet-558m": _a(256, 558, 527.8),
    "unet-704m": _a(288, 704, 652.0),
    "unet-866m": _a(320, 866, 789.3),
    "unet-2b": _a(512, 2000, 1887.5),
    "unet-5b": _a(768, 5000, 4082.6),
    "unet-sd2": _sd2(320, 870, 86),
    "unet-sd2-c512": _sd2(512, 2190, 219),
    "unet-if-xl-c512": _if_xl(512, 2040, 194),
    "unet-if-xl": _if_xl(704, 3830, 364),
    "unet-sdxl-c128": _sdxl(128, (2, 10), 420, 35),
    "unet-sdxl-c192": _sdxl(192, (2, 10), 900, 75),
    "unet-sdxl": _sdxl(320, (2, 10), 2390, 198),
    "unet-sdxl-c384": _sdxl(384, (2, 10), 3400, 282),
    "unet-sdxl-td2": _sdxl(320, (2, 2), 850, 98),
    "unet-sdxl-td4": _sdxl(320, (2, 4), 1240, 123),
    "unet-sdxl-td12": _sdxl(320, (2, 12), 2780, 223),
    "unet-sdxl-td14": _sdxl(320, (2, 14), 3160, 248),
    "unet-sdxl-td4_4": _sdxl(320, (4, 4), 1320, 143),
    "unet-sdxl-td4_8": _sdxl(320, (4, 8), 2090, 193),
    "unet-sdxl-td4_12": _sdxl(320, (4, 12), 2860, 243),
    "unet-sdxl-c384-td4_12": _sdxl(384, (4, 12), 4070, 346),
    "pixart-alpha": _pixart(1152, 28, 610, 139, "its own 120 tokens of text make 142.8 GMACs"),
    "pixart-1152-d28": _pixart(1152, 28, 610, 139, text_width=1024),
    "pixart-1536-d28": _pixart(1536, 28, 1080, 247, text_width=1024),
    "pixart-1024-d28": _pixart(1024, 28, 480, 110, text_width=1024, caption_mlp=False),
    "pixart-1024-d56": _pixart(1024, 56, 950, 220, text_width=1024, caption_mlp=False),
    "uvit-2048-d42": _uvit(2048),
    "uvit-2560-d42": _uvit(2560),
    "sd1.5": Size(
        UNetConfig(text_width=768, num_heads=8, use_linear_projection=False), "as released"
    ),
    "sd2.1": Size(UNetConfig(sample_size=96), "as released"),
    "sdxl-1.0": Size(_SDXL, "as released"),
    "pixart-xl-2-512": Size(PixArtConfig(), "as released", text_tokens=120),
    "pixart-xl-2-1024-ms": Size(
        PixArtConfig(sample_size=128, size_conditioning=True), "as released", text_tokens=120
    ),
}
# What NAME may be in NAME@params=..., beside every size: a family's member of middling cost.
FAMILIES = {"unet": "unet-866m", "pixart": "pixart-1152-d28", "uvit": "uvit-2048-d42"}


def backbone(name: str) -> Any:
    """The config of a size, "unet-866m", or of the width that comes nearest to a cost: "unet@params=300e6".

    The latter is the size named before the @ (or a family of FAMILIES) at another width, with all else the same;
    `params` counts parameters, `flops` the floating-point operations of a forward pass. What was chosen is logged.

    Raises:
      ValueError: a name that there is not, or a cost that no width comes near.
    """
    base, at, target = name.partition("@")
    base = FAMILIES.get(base, base) if at else base
    if base not in SIZES:
        near = difflib.get_close_matches(base, [*SIZES, *FAMILIES], n=3)
        raise ValueError(
            f"there is no backbone {base!r}; "
            + (f"near to it are {', '.join(near)}" if near else f"there are {', '.join(SIZES)}")
        )
    return _of_cost(SIZES[base], name, target) if at else SIZES[base].config


def _of_cost(size: Size, name: str, target: str) -> Any:
    kind, _, text = target.partition("=")
    if kind not in TARGETS:
        raise ValueError(
            f"{name}: after the @ stands {' or '.join(f'{k}=NUMBER' for k in TARGETS)}"
        )
    try:
        wanted = float(text)
    except ValueError:
        raise ValueError(f"{name}: {text!r} is no number") from None

    def cost(config: Any) -> Number:
        return TARGETS[kind](count(config, text_tokens=size.text_tokens))

    config = min(_widths(size.config), key=lambda config: abs(cost(config) - wanted))
    if not 0.5 < cost(config) / wanted < 2:
        raise ValueError(f"{name}: the nearest that there is has {kind}={cost(config):.3g}")
    total = count(config, text_tokens=size.text_tokens).total
    shape = config.channels if isinstance(config, UNetConfig) else config.width
    _log.info(
        "%s: width %s, %.1f M parameters, %.1f GFLOPs a forward pass",
        name,
        shape,
        total.params / 1e6,
        total.flops / 1e9,
    )
    return config


def _widths(config: Any) -> Iterator[Any]:
    """The same network at every width that its heads and groups divide."""
    for width in range(WIDTH_STEP, MAX_WIDTH + 1, WIDTH_STEP):
        if isinstance(config, UNetConfig):
            levels = [channels // config.channels[0] for channels in config.channels]
            fields: dict[str, Any] = {"channels": tuple(width * level for level in levels)}
        else:
            fields = {"width": width}
        with contextlib.suppress(ValueError):
            yield dataclasses.replace(config, **fields)
