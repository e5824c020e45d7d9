"""Products of matrices in a compiled program, which TPUs compute as convolutions, and how they fill the matrix unit.

A batch of products is a convolution as well: its examples are laid out as places, so far apart that each meets one tap.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ldm_jax.planning.aot import Computations, Line, bodies, integers


class Product(NamedTuple):
    """One product of matrices, or what a convolution is of it."""

    name: str  # "dot" or "convolution"
    sizes: tuple[
        int, int, int
    ]  # rows, inner size and columns; the taps of a convolution are among the inner

    @property
    def flops(self) -> float:
        """Floating-point operations, also those with zeros at edges and between dilated elements."""
        return 2.0 * math.prod(self.sizes)

    @property
    def filled(self) -> float:
        """The share of the matrix unit that computes: one matrix fills tiles of 128 x 128, the other eights."""
        rows, inner, columns = self.sizes
        other = max(_full(columns, 128) * _full(rows, 8), _full(rows, 128) * _full(columns, 8))
        return _full(inner, 128) * other


def products(computations: Computations, lines: Sequence[Line], line: Line) -> Iterator[Product]:
    """Those in an instruction of `lines`."""
    for body, each in ((lines, [line]), *((inner, inner) for inner in bodies(computations, line))):
        for found in each:
            if found.operation == "convolution":
                yield Product(product_name(found), _sizes(body, found))


def product_name(line: Line) -> str:
    """What a convolution is in the source: a "convolution" or a "dot"."""
    if "dot_general" in line.scope or "conv_general" in line.scope:
        convolves = "conv_general" in line.scope
    else:
        convolves = bool(re.search(r"dim_labels=\w*\d", line.text))
    return "convolution" if convolves else "dot"


def _sizes(lines: Sequence[Line], product: Line) -> tuple[int, int, int]:
    shapes = {line.name: line.shape for line in lines}
    left, right = (_dims(shapes[name]) for name in product.operands[:2])
    ((of_left, of_right),) = re.findall(r"dim_labels=(\w+)_(\w+)->", product.text)
    inner = right[of_right.index("i")]
    sizes = _window(product, "size")
    dilations, strides = (
        _window(product, key) or [1] * len(sizes) for key in ("lhs_dilate", "stride")
    )
    for number, (size, dilation, stride) in enumerate(zip(sizes, dilations, strides, strict=True)):
        # As many taps as there are places, and one where examples of a batched product are laid out as places.
        batched = dilation > 1 and (stride > 1 or dilation == size)
        inner *= 1 if batched else min(size, left[of_left.index(str(number))])
    columns = right[of_right.index("o")]
    return math.prod(_dims(product.shape)) // columns, inner, columns


def _window(product: Line, key: str) -> list[int]:
    found = re.search(rf"\b{key}=([\dx]+)", product.text)
    return [int(size) for size in found[1].split("x")] if found else []


def _full(size: int, tile: int) -> float:
    return size / (-(-size // tile) * tile)


def _dims(shape: str) -> list[int]:
    return integers(re.findall(r"\[([\d,]*)\]", shape)[0])
