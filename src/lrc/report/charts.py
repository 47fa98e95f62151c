"""Charts of values over tokens or time: one description, drawn into a PNG or into a page.

matplotlib draws both with the light colors of page.css. In a page's SVG these become the page's CSS
variables, so one picture works in light and dark mode, and text stays text in the page's font.
"""

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lrc.report.pictures import as_label, save_picture

COLORS = 8
"""Number of colors; with more lines the colors repeat in other line styles."""

DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
"""Line styles; page.css draws the matching chips."""

POINTS = 300
"""Points of a drawn line; more would enlarge the page but not make the line clearer."""

STEPS = (1, 2, 2.5, 5, 10)
"""Distances of ticks, times a power of ten."""

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))

WIDE, SMALL, LARGE = (4.6, 2.9), (3.0, 2.1), (5.2, 3.2)
"""Inches; the page scales them."""


class Series(NamedTuple):
    """A run, an entry or a source: its name and the number that gives its color and line style."""

    name: str
    number: int

    @property
    def color(self) -> str:
        """Name of its CSS variable."""
        return f"--run-{self.number % COLORS}"

    @property
    def dash(self) -> int:
        """Index of its line style in `DASHES`."""
        return self.number // COLORS % len(DASHES)


@dataclass(frozen=True)
class Line:
    """The values of a series in a chart."""

    series: Series
    x: Sequence[float]
    y: Sequence[float]
    teacher: float | None = None
    """The teacher's value, drawn dashed."""
    marked: bool = False
    """Whether each value gets a marker: few values, each measured separately."""
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """Lowest and highest values around the marked ones, drawn in a lighter shade."""
    stages: Sequence[tuple[float, str]] = ()
    """Positions on the horizontal axis where another stage began, with a label for the change."""


@dataclass(frozen=True)
class Chart:
    """Lines over tokens or time."""

    title: str
    lines: Sequence[Line]
    x_label: str
    logarithmic: bool = False
    """Whether the vertical axis is logarithmic, if all values are positive."""
    top: float | None = None
    """Upper end of the vertical axis; None: as high as the values."""


def save_charts(title: str, charts: Sequence[Chart], path: Path) -> None:
    """Draw charts into one PNG, two in a row, with a legend if there are several series.

    Args:
        title: the picture's title.
        charts: at least one; if their number is odd, the first is as wide as two.
        path: the picture; an existing one is replaced.

    Raises:
        UserError: if the disk is full.
    """
    rows = (len(charts) + 1) // 2
    with _style(title):
        figure = Figure(figsize=(10.5, 3.2 * rows + 0.8), layout="constrained")
        grid = figure.add_gridspec(rows, 2)
        wide = len(charts) % 2
        for place, chart in enumerate(charts, start=wide):
            cell = grid[0, :] if wide and place == 1 else grid[place // 2, place % 2]
            axes = figure.add_subplot(cell)
            _draw(axes, chart)
            axes.set_title(chart.title, loc="left")
        figure.suptitle(as_label(title), x=0.01, ha="left", fontsize=12)
        series = legend(charts)
        if series:
            handles = [
                Line2D([], [], color=_colors()[one.color], linestyle=DASHES[one.dash])
                for one in series
            ]
            names = [as_label(one.name) for one in series]
            figure.legend(handles, names, loc="outside lower left", ncols=5, frameon=False)
        save_picture(figure, path)


def svg_chart(chart: Chart, size: tuple[float, float] = WIDE) -> Markup:
    """A chart for a page, without its title; `size` is in inches."""
    with _style(chart.title):
        figure, axes = _figure(size)
        _draw(axes, chart)
        return _svg(figure, chart.title)


def legend(charts: Iterable[Chart]) -> list[Series]:
    """The series of some charts; empty if there is only one, which needs no legend."""
    series = dict.fromkeys(line.series for chart in charts for line in chart.lines)
    return sorted(series, key=lambda one: one.number) if len(series) > 1 else []


def short(value: float, space: str = "", digits: int = 4) -> str:
    """A number with a unit for thousands, such as 20k or 1.25M.

    Args:
        value: the number.
        space: what to put between number and unit.
        digits: number of significant digits.
    """
    found = ((size, unit) for size, unit in UNITS if abs(value) >= 0.9995 * size)
    size, unit = next(found, (1.0, ""))
    return f"{value / size:.{digits}g}{space if unit else ''}{unit}"


def heat_map(
    title: str, values: np.ndarray[Any, Any], tokens: float, norm: LogNorm, x_label: str
) -> Markup:
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
        axes.set_title(title, loc="left")
        axes.set_ylabel("layer")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        _label_x(axes, x_label)
        return _svg(figure, title)


def color_scale(title: str, norm: LogNorm) -> Markup:
    """The color legend of heat maps."""
    with _style(title):
        figure = Figure(figsize=(4.6, 0.55), layout="constrained")
        axes = figure.subplots()
        scalar = matplotlib.cm.ScalarMappable(norm)
        figure.colorbar(scalar, cax=axes, orientation="horizontal")
        _plain_ticks(axes.xaxis, *norm.inverse(np.array([0.0, 1.0])))
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


def _draw(axes: Axes, chart: Chart) -> None:
    """Draw a chart. Noisy lines are averaged over spans; a lighter shade shows their range."""
    for line in chart.lines:
        color = _colors()[line.series.color]
        band: Any
        x, y, *band = (line.x, line.y, *(line.band or ())) if line.marked else spans(line.x, line.y)
        if band:
            axes.fill_between(x, *band, color=color, alpha=0.17, linewidth=0)
        marker = "o" if line.marked else None
        dashes = DASHES[line.series.dash]
        axes.plot(x, y, color=color, linestyle=dashes, marker=marker, markersize=2.5)
        for place, stage in line.stages:
            axes.axvline(place, color=color, linestyle=(0, (1, 2)), linewidth=1)
            axes.annotate(
                stage,
                (place, 1),
                xycoords=("data", "axes fraction"),
                xytext=(2, -2),
                textcoords="offset points",
                va="top",
                color=_colors()["--muted"],
                fontsize=7,
            )
    teachers = _draw_teachers(axes, chart.lines)
    values = [*(value for line in chart.lines for value in line.y), *teachers]
    if chart.logarithmic and min(values) > 0:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis, min(values), max(values))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if chart.top is not None:
        axes.set_ylim(top=max([chart.top, *teachers]))
    _label_teachers(axes, teachers)
    _label_x(axes, chart.x_label)
    axes.grid(axis="y")


def _draw_teachers(axes: Axes, lines: Sequence[Line]) -> dict[float, str]:
    """Draw every teacher's level once; returns the color by level."""
    levels: dict[float, str] = {}
    for line in lines:
        if line.teacher is not None:
            levels.setdefault(round(line.teacher, 3), _colors()[line.series.color])
    if len(levels) == 1:
        levels = dict.fromkeys(levels, _colors()["--muted"])
    for level, color in levels.items():
        axes.axhline(level, color=color, linestyle=(0, (4, 3)), linewidth=1)
    return levels


def _label_teachers(axes: Axes, levels: dict[float, str]) -> None:
    """Write "teacher" at the end of each level; labels of close levels are moved apart."""
    axes.get_ylim()  # matplotlib computes the limits when they are asked for
    place = -math.inf
    for level in sorted(levels):
        height = (axes.transScale + axes.transLimits).transform((0, level))[1]
        place = max(height, place + 0.08)
        axes.text(
            1.01, place, "teacher", transform=axes.transAxes, va="center", color=levels[level]
        )


def _label_x(axes: Axes, name: str) -> None:
    axes.set_xlabel(name)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS))


def _plain_ticks(axis: Axis, low: float, high: float) -> None:
    """Put few ticks with plain numbers on a logarithmic axis.

    matplotlib's own tick labels collide in small charts.
    """
    decades = math.log10(high / low)
    steps = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 3.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps) if decades > 0.8 else MaxNLocator(5, steps=STEPS))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


@cache
def _colors() -> dict[str, str]:
    """The light colors of the page by CSS variable."""
    style = (resources.files("lrc.report") / "page.css").read_text(encoding="utf-8")
    return dict(re.findall(r"(--[\w-]+): (#\w{6})", style.partition("@media")[0]))


def _style(salt: str) -> Any:
    """matplotlib settings: text as text, the page's colors, reproducible files."""
    ink, muted = _colors()["--ink"], _colors()["--muted"]
    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.titlecolor": ink,
            "axes.edgecolor": muted,
            "axes.labelcolor": muted,
            "axes.linewidth": 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": ink,
            "xtick.color": muted,
            "ytick.color": muted,
            "grid.color": _colors()["--line"],
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.4,
            "image.cmap": "viridis",
        }
    )


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure, title: str) -> Markup:
    """The picture as an SVG element, in the page's colors and with the width of its container."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    opening = f'<svg viewBox="\\1" role="img"><title>{escape(title)}</title>'
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', opening, text, count=1)
    for variable, color in _colors().items():
        text = text.replace(color, f"var({variable})")
    return Markup(text)
