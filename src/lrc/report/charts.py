"""Charts as inline SVG for a page, drawn by matplotlib.

matplotlib draws with placeholder colors, which are then replaced by the page's CSS variables. So
one picture works in light and dark mode. Text stays text, in the page's font. Charts are small, so
that they stay legible at the width of a phone.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

INK, MUTED, GRID = "#000001", "#000002", "#000003"
RUN_COLORS = tuple(f"#0000{16 + i:02x}" for i in range(8))
"""Placeholders of the page's colors. If there are more runs than colors, the colors repeat."""

VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line"}
VARIABLES |= {stand_in: f"--run-{i}" for i, stand_in in enumerate(RUN_COLORS)}

DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
"""Line styles, for more lines than colors; page.css draws the matching chips."""

POINTS = 300
"""Points of a drawn line; more would enlarge the page but not make the line clearer."""

WIDE, SMALL, LARGE = (4.6, 2.9), (3.0, 2.1), (5.2, 4.0)
"""Inches; the page scales them."""


@dataclass(frozen=True)
class Line:
    """One run's values in a chart."""

    name: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    baseline: float | None = None
    """A level to compare with, drawn dashed."""
    marked: bool = False
    """Whether each value gets a marker: few values, each measured separately."""
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """Lowest and highest values around the marked ones, drawn in a lighter shade."""
    dash: int = 0
    """Index of the line style in `DASHES`."""
    stages: Sequence[tuple[float, str]] = ()
    """Positions on the horizontal axis where another stage began, with a label for the change."""


def run_color(index: int) -> str:
    """The placeholder of a run's color."""
    return RUN_COLORS[index % len(RUN_COLORS)]


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    logarithmic: bool = False,
    size: tuple[float, float] = WIDE,
    top: float | None = None,
) -> str:
    """Chart of values of several runs over tokens or time.

    Noisy lines are averaged over spans. A lighter shade behind them shows the range of each span.

    Args:
        title: the chart's name.
        lines: the lines to draw.
        x_label: name of the horizontal axis.
        logarithmic: whether the vertical axis is logarithmic.
        size: width and height in inches.
        top: upper end of the vertical axis; None: as high as the values.
    """
    with _style(title):
        figure, axes = _figure(size)
        for line in lines:
            if line.marked:
                if line.band is not None:
                    axes.fill_between(line.x, *line.band, color=line.color, alpha=0.16, linewidth=0)
                dashes = DASHES[line.dash]
                axes.plot(
                    line.x, line.y, color=line.color, marker="o", markersize=2.5, linestyle=dashes
                )
            else:
                x, y, low, high = spans(line.x, line.y)
                axes.fill_between(x, low, high, color=line.color, alpha=0.18, linewidth=0)
                axes.plot(x, y, color=line.color)
            if line.baseline is not None:
                axes.axhline(line.baseline, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
            for place, stage in line.stages:
                axes.axvline(place, color=line.color, linestyle=(0, (1, 2)), linewidth=1)
                axes.annotate(
                    stage,
                    (place, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(2, -2),
                    textcoords="offset points",
                    va="top",
                    color=MUTED,
                    fontsize=7,
                )
        ys = [line.y for line in lines]
        if logarithmic and min(map(min, ys)) > 0:
            axes.set_yscale("log")
            _plain_decades(axes.yaxis, min(map(min, ys)), max(map(max, ys)))
        if top is not None:
            axes.set_ylim(top=top)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", color=GRID)
        return _svg(figure, title)


def heat_map(
    title: str, values: np.ndarray[Any, Any], tokens: float, norm: LogNorm, x_label: str
) -> str:
    """Heat map of a quantity for every layer over the run.

    Args:
        title: the chart's name.
        values: [layers, columns], with columns evenly spaced in training tokens.
        tokens: training tokens at the right edge.
        norm: the color scale, shared by the charts of a run.
        x_label: name of the horizontal axis.
    """
    with _style(title):
        figure, axes = _figure(SMALL)
        extent = (0.0, tokens, len(values) - 0.5, -0.5)
        axes.imshow(values, aspect="auto", norm=norm, extent=extent, interpolation="none")
        axes.set_title(title, loc="left", color=INK)
        axes.set_xlabel(x_label)
        axes.set_ylabel("layer")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        return _svg(figure, title)


def color_scale(title: str, norm: LogNorm) -> str:
    """The color legend of heat maps."""
    with _style(title):
        figure = Figure(figsize=(4.6, 0.55), layout="constrained")
        axes = figure.subplots()
        scalar = matplotlib.cm.ScalarMappable(norm)
        figure.colorbar(scalar, cax=axes, orientation="horizontal")
        _plain_decades(axes.xaxis, *norm.inverse(np.array([0.0, 1.0])))
        axes.tick_params(color=MUTED, labelcolor=MUTED)
        return _svg(figure, title)


def spans(
    x: Sequence[float], y: Sequence[float], points: int = POINTS
) -> tuple[np.ndarray[Any, Any], ...]:
    """Mean position, mean, lowest and highest value of evenly filled spans, each [spans].

    There are at most `points` spans. Lines with few values get fewer spans, so that noise does not
    hide the trend.
    """
    count = min(points, max(len(x) // 5, min(len(x), 40)))
    places = [part.mean() for part in np.array_split(np.asarray(x, float), count)]
    parts = np.array_split(np.asarray(y, float), count)
    means, lows, highs = zip(*((p.mean(), p.min(), p.max()) for p in parts), strict=True)
    return np.array(places), np.array(means), np.array(lows), np.array(highs)


def _plain_decades(axis: Axis, low: float, high: float) -> None:
    """Put few ticks with plain numbers on a logarithmic axis.

    matplotlib's own tick labels collide in small charts.
    """
    decades = math.log10(high / low)
    steps = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1 else (1.0, 2.0, 3.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _style(salt: str) -> Any:
    """matplotlib settings: text as text, the page's colors, reproducible files."""
    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": MUTED,
            "axes.linewidth": 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": INK,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.4,
            "image.cmap": "viridis",
        }
    )


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure, title: str) -> str:
    """The picture as an SVG element, in the page's colors and with the width of its container."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text)
    text = text.replace('role="img">', f'role="img"><title>{_escaped(title)}</title>', 1)
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    return text


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
