"""Figures in one style, as SVG that stands inside a page: no address, no font file, no script."""

import html
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

INK, SOFT, LINE = "#1d2430", "#5d6675", "#e3e6eb"
BLUE, ORANGE, GREEN, GREY = "#2563a8", "#b4541a", "#2f855a", "#8a93a3"
PURPLE = "#8250b4"

Values = Sequence[int | float] | Float[np.ndarray, " points"] | Int[np.ndarray, " points"]

DPI = 110
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))

STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


Paint = Callable[[Axes], None]
Size = tuple[int | float, int | float]  # inches


def svg(paint: Paint, *, title: str, size: Size) -> str:
    """One chart as an `<svg>` element; `paint` draws into its axes, `size` is in inches."""
    stream = io.StringIO()
    _write(charts({title: paint}, size=size), stream, format="svg", transparent=True)
    return _element(stream.getvalue(), title)


def charts(paints: Mapping[str, Paint], *, size: Size, columns: int = 3) -> Figure:
    """Charts by title, side by side and row by row; `size` is that of one, in inches."""
    columns = min(columns, len(paints))
    rows = -(-len(paints) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        for number, (title, paint) in enumerate(paints.items(), 1):
            paint(figure.add_subplot(rows, columns, number, title=title))
    return figure


def save(figure: Figure, path: epath.PathLike) -> None:
    """Writes PATH.png and PATH.svg; the same figure is the same bytes."""
    for kind in ("png", "svg"):
        stream = io.BytesIO()
        _write(figure, stream, format=kind, dpi=DPI)
        epath.Path(f"{os.fspath(path)}.{kind}").write_bytes(stream.getvalue())


def _write(figure: Figure, stream: io.StringIO | io.BytesIO, **options: Any) -> None:
    metadata = NO_METADATA if options["format"] == "svg" else {"Software": None}
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": " ".join(titles)}):
        figure.savefig(stream, metadata=metadata, **options)


def examples_axis(axes: Axes) -> None:
    """The x axis counts examples: 0, 20k, 1.5M."""
    axes.set_xlabel("examples")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def positive_axis(axes: Axes, values: Values) -> None:
    """The y axis of positive values: logarithmic, with plain numbers, where they span much."""
    known = np.array([value for value in values if np.isfinite(value) and value > 0])
    if known.size and known.max() > 6 * known.min():
        log_axis(axes.yaxis, known)


def log_axis(axis: Axis, values: Values) -> None:
    """A logarithmic axis with plain numbers: 1, 2, 5 of a decade, or decades where there are many."""
    known = np.array([value for value in values if np.isfinite(value) and value > 0])
    many = known.size and known.max() > 100 * known.min()
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1,) if many else (1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def curve(
    axes: Axes,
    x: Values,
    y: Values,
    *,
    color: object,
    label: str | None = None,
    band: tuple[Values, Values] | None = None,
) -> None:
    """A line with its points, and the band between two others."""
    axes.plot(x, y, color=color, label=label, marker="o", markersize=3.2)
    if band is not None:
        axes.fill_between(x, *band, color=color, alpha=0.16, linewidth=0)


def level(axes: Axes, y: int | float, label: str) -> None:
    """A dashed line across, with its name on it."""
    axes.axhline(y, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    place = {"xy": (1, y), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(label, xytext=(-2, 3), ha="right", color=SOFT, fontsize=8, **place)


def _element(document: str, title: str) -> str:
    """The element alone: without prolog and namespaces, which HTML does not want, and running ids."""
    element = document[document.index("<svg") :]
    element = re.sub(r' xmlns(:xlink)?="[^"]*"', "", element)
    element = re.sub(r' id="[\w.]+_\d+"', "", element)
    label = html.escape(title, quote=True)
    return element.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
