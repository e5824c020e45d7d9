"""What the HTML pages share: a style, tables, charts and pictures; no address, no font file, nothing from outside.

The style is in pages.css, for light and for dark screens. Cells of tables are HTML; all other text is escaped here.
"""

import base64
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from einops import rearrange
from etils import epath
from jaxtyping import UInt8
from matplotlib.axes import Axes
from PIL import Image

from ldm_jax.evals.networks import NEED_OTHERS, embedded_on_foreign
from ldm_jax.pages import plots
from ldm_jax.types import Estimate

COLUMNS, GAP = 8, 2  # of a grid: images in a row, and white pixels around each
MAX_TILE = 160  # pixels of an image's side on the page
CHART = (4.2, 2.6)  # inches


def fill(template: Path, **parts: str) -> str:
    """The page of a template: `$style` in it is the shared style, every other name is one of `parts`, as HTML."""
    style = Path(__file__).with_suffix(".css").read_text()
    return Template(template.read_text()).substitute(style=style, **parts)


def chart(
    title: str, paint: Callable[[Axes], None], size: tuple[int | float, int | float] = CHART
) -> str:
    """One chart in its frame; `size` is in inches."""
    return f'<div class="chart">{plots.svg(paint, title=title, size=size)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML cells; the headings, and the names that rows begin with, are plain text."""
    top = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{html.escape(first)}</th>'
        f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for first, *cells in rows
    )
    return f'<div class="table"><table>{f"<tr>{top}</tr>" if top else ""}{body}</table></div>'


def estimate(score: Estimate | None) -> str:
    """A score with its interval and its count, as HTML."""
    if score is None:
        return "<small>not known</small>"
    return f"<b>{number(score.value)}</b> <small>{interval(score)}, n = {score.count}</small>"


def interval(score: Estimate) -> str:
    """The bounds of a score; plain words where it has none."""
    if math.isnan(score.low) or math.isnan(score.high):
        return "no interval"
    return f"{number(score.low)} to {number(score.high)}"


def missing(sentence: str) -> str:
    """A sentence in the place of what is not there."""
    return f'<p class="missing">{html.escape(sentence)}</p>'


def foreign(config: Mapping[str, Any]) -> str:
    """A sentence where embedded networks score images that they do not know; nothing elsewhere."""
    networks = embedded_on_foreign(config)
    return missing(NEED_OTHERS % ", ".join(networks)) if networks else ""


def number(value: int | float) -> str:
    """A number in three digits, or whole: 0.831, 24.5, 1,234; what is within rounding of zero is 0."""
    if math.isnan(value):
        return "not a number"
    value = round(value, 12) + 0.0  # and no -0
    return f"{value:,.0f}" if 999.5 <= abs(value) < math.inf else f"{value:.3g}"


def duration(seconds: int | float) -> str:
    """A time in its two largest units: 7 min 40 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (number, _) in enumerate(parts) if number), 2)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2])


def cut_grid(path: epath.PathLike) -> UInt8[np.ndarray, "images side side 3"]:
    """The images of a grid of `COLUMNS` as `evals.image_grids` lays it; white ones fill the last row.

    Raises OSError for a file that is not there or is no image.
    """
    with Image.open(io.BytesIO(epath.Path(path).read_bytes())) as image:
        pixels = np.asarray(image.convert("RGB"))[GAP:, GAP:]
    side = pixels.shape[1] // COLUMNS
    tiles = rearrange(pixels, "(r h) (c w) rgb -> (r c) h w rgb", h=side, w=side)
    return tiles[:, : side - GAP, : side - GAP]


def data_address(image: Image.Image, kind: str = "png", **options: Any) -> str:
    """An image as an address that holds it: `data:image/png;base64,...`; `options` are Pillow's for the format."""
    stream = io.BytesIO()
    image.save(stream, format=kind.upper(), optimize=True, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
