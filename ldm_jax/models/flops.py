"""What a network costs: counted by its layers from the config alone, and by walking the jaxpr of any program."""

import collections
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core

from ldm_jax.models.pixart_config import SINUSOIDS, PixArtConfig
from ldm_jax.models.unet_config import DEEPFLOYD, UNetConfig
from ldm_jax.models.uvit_config import UViTConfig

TRAINING = 3  # forward passes that a training step costs: the gradient takes two products for each


class Cost(NamedTuple):
    """Parameters; multiply-adds with parameters; multiply-adds of attention, between queries, keys and values."""

    params: int = 0
    macs: int = 0
    scores: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations of a forward pass: two a multiply-add."""
        return 2 * (self.macs + self.scores)


class Count(NamedTuple):
    """The cost of one forward pass for one image, by part: convolution, self-attention, cross-attention, mlp, ..."""

    parts: Mapping[str, Cost]

    @property
    def total(self) -> Cost:
        """All parts together."""
        return Cost(*map(sum, zip(*self.parts.values(), strict=True)))

    @property
    def training_flops(self) -> int:
        """Floating-point operations of a training step for one image, nothing recomputed."""
        return TRAINING * self.total.flops


Layers = Iterator[tuple[str, Cost]]


def count(config: Any, side: int | None = None, text_tokens: int = 77) -> Count:
    """The cost of a backbone for latents of `side` rows and columns (its `sample_size` if not given).

    Dense layers, convolutions (all taps of a kernel, where they meet padding too) and attention count as
    `traced_flops` counts them; element-wise work counts nothing.
    """
    sums: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for part, cost in LAYERS[type(config)](config, side or config.sample_size, text_tokens):
        sums[part] = [total + more for total, more in zip(sums[part], cost, strict=True)]
    return Count({part: Cost(*total) for part, total in sums.items()})


def _dense(inputs: int, outputs: int, tokens: int, bias: bool = True) -> Cost:
    return Cost(inputs * outputs + bias * outputs, inputs * outputs * tokens)


def _conv(inputs: int, outputs: int, pixels: int) -> Cost:
    return Cost(9 * inputs * outputs + outputs, 9 * inputs * outputs * pixels)


def _sum(*costs: Cost) -> Cost:
    return Cost(*map(sum, zip(*costs, strict=True)))


def _attention(width: int, queries: int, keys: int, source: int, sources: int, bias: bool) -> Cost:
    """From `queries` tokens to `keys`, of which `sources`, `source` wide, are projected to keys and values."""
    to_q, to_out = _dense(width, width, queries, bias), _dense(width, width, queries)
    to_kv = _dense(source, 2 * width, sources, bias)
    return _sum(to_q, to_kv, to_out, Cost(scores=2 * queries * keys * width))


def _mlp(inputs: int, hidden: int, outputs: int, tokens: int) -> Cost:
    return _sum(_dense(inputs, hidden, tokens), _dense(hidden, outputs, tokens))


def _embedding(inputs: int, outputs: int) -> Cost:
    """Of one number, by two layers."""
    return _mlp(inputs, outputs, outputs, tokens=1)


def _norm(width: int) -> Cost:
    return Cost(2 * width)


def _unet(config: UNetConfig, side: int, text_tokens: int) -> Layers:
    channels, depths = config.channels, config.transformer_depth
    pixels, width, skips = side * side, channels[0], [channels[0]]
    yield "convolution", _conv(config.in_channels, width, pixels)
    yield "embedding", _embedding(width, config.time_width)
    if config.pooled_width:
        yield "embedding", _embedding(config.added_width, config.time_width)
    for i, (outputs, depth) in enumerate(zip(channels, depths, strict=True)):
        for _ in range(config.num_res_blocks):
            yield from _res_block(width, outputs, pixels, config)
            yield from _attentions(outputs, depth, pixels, text_tokens, config)
            skips.append(width := outputs)
        if i < len(channels) - 1:
            pixels //= 4
            yield from _resampler(width, pixels, config)
            skips.append(width)
    if config.mid_depth is not None:
        yield from _res_block(width, width, pixels, config)
    if config.mid_depth:
        yield from _attentions(width, config.mid_depth, pixels, text_tokens, config)
        yield from _res_block(width, width, pixels, config)
    for i in reversed(range(len(channels))):
        for _ in range(config.num_res_blocks + 1):
            yield from _res_block(width + skips.pop(), channels[i], pixels, config)
            yield from _attentions(channels[i], depths[i], pixels, text_tokens, config)
            width = channels[i]
        if i:
            pixels *= 4
            yield from _resampler(width, pixels, config)
    yield "norm", _norm(width)
    yield "convolution", _conv(width, config.out_channels, pixels)


def _res_block(inputs: int, outputs: int, pixels: int, config: UNetConfig) -> Layers:
    yield "norm", _sum(_norm(inputs), _norm(outputs))
    yield "convolution", _sum(_conv(inputs, outputs, pixels), _conv(outputs, outputs, pixels))
    yield "embedding", _dense(config.time_width, outputs * (1 + (config.blocks == DEEPFLOYD)), 1)
    if inputs != outputs:
        yield "convolution", _dense(inputs, outputs, pixels)


def _resampler(width: int, pixels: int, config: UNetConfig) -> Layers:
    if config.blocks == DEEPFLOYD:
        yield from _res_block(width, width, pixels, config)
    else:
        yield "convolution", _conv(width, width, pixels)


def _attentions(
    width: int, depth: int, pixels: int, text_tokens: int, config: UNetConfig
) -> Layers:
    """What stands after a residual block; nothing where `depth` is 0."""
    text = config.text_width
    if depth:
        yield "norm", _norm(width)
    if depth and config.blocks == DEEPFLOYD:
        keys = pixels + text_tokens
        yield "self-attention", _attention(width, pixels, keys, width, pixels, bias=True)
        yield "cross-attention", _dense(text, 2 * width, text_tokens)
        return
    for _ in range(depth):
        yield "norm", _sum(*[_norm(width)] * 3)
        yield "self-attention", _attention(width, pixels, pixels, width, pixels, bias=False)
        cross = _attention(width, pixels, text_tokens, text, text_tokens, bias=False)
        yield "cross-attention", cross
        yield "mlp", _sum(_dense(width, 8 * width, pixels), _dense(4 * width, width, pixels))
    if depth:
        yield "projection", _sum(*[_dense(width, width, pixels)] * 2)


def _pixart(config: PixArtConfig, side: int, text_tokens: int) -> Layers:
    width, area = config.width, config.patch_size**2
    tokens = side * side // area
    yield "projection", _dense(area * config.in_channels, width, tokens)
    yield "embedding", _sum(_embedding(SINUSOIDS, width), _dense(width, 6 * width, 1))
    if config.size_conditioning:
        one = _embedding(SINUSOIDS, width // 3)
        yield "embedding", _sum(one, one, Cost(macs=one.macs))  # rows and columns share theirs
    if config.caption_mlp:
        yield "embedding", _mlp(config.text_width, width, width, text_tokens)
    for _ in range(config.depth):
        yield "norm", Cost(6 * width)
        yield "self-attention", _attention(width, tokens, tokens, width, tokens, bias=True)
        yield "cross-attention", _attention(width, tokens, text_tokens, width, text_tokens, True)
        yield "mlp", _mlp(width, 4 * width, width, tokens)
    yield "norm", Cost(2 * width)
    yield "projection", _dense(width, area * config.out_channels, tokens)


def _uvit(config: UViTConfig, side: int, text_tokens: int) -> Layers:
    width, area = config.width, config.patch_size**2
    image = side * side // area
    tokens = 1 + text_tokens + image
    positions = 1 + config.text_length + config.sample_size**2 // area
    yield "embedding", _sum(_dense(config.text_width, width, text_tokens), Cost(positions * width))
    yield "projection", _dense(area * config.in_channels, width, image)
    for _ in range(config.depth + 1):
        yield "norm", _sum(*[_norm(width)] * 2)
        yield "self-attention", _attention(width, tokens, tokens, width, tokens, bias=False)
        yield "mlp", _mlp(width, config.mlp_ratio * width, width, tokens)
    for _ in range(config.depth // 2):
        yield "skip", _dense(2 * width, width, tokens)
    yield "norm", _norm(width)
    yield "projection", _dense(width, area * config.out_channels, image)
    yield "convolution", _conv(config.out_channels, config.out_channels, side * side)


LAYERS: dict[type, Callable[[Any, int, int], Layers]] = {
    UNetConfig: _unet,
    PixArtConfig: _pixart,
    UViTConfig: _uvit,
}


def traced_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Floating-point operations of the products in `function(*args)`: two for each multiply-add.

    Dots and convolutions count, with all taps of a kernel even where they meet padding (but not
    the zeros between the rows of a strided convolution's gradient), and the body of a scan as
    often as it runs; element-wise work does not. Arguments may be ShapeDtypeStructs: nothing is computed.
    The whole of a `while` is counted once, of a `cond` its most expensive branch.
    """
    return _walk(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def _walk(jaxpr: core.Jaxpr) -> int:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        taps = math.prod(shape[dim] for dim in contracted)
        return 2 * taps * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        taps = 2 * math.prod(kernel) // outputs * math.prod(equation.outvars[0].aval.shape)
        return taps // math.prod(params["lhs_dilation"])  # the rows between are zeros, not data
    inner = [_walk(jaxpr) for jaxpr in core.jaxprs_in_params(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * params.get("length", 1) if name == "scan" else sum(inner)
