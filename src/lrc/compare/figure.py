"""The overlaid held-out curves of a comparison, against tokens and against time."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lrc.compare.results import EntryResult, Results
from lrc.files import new_file

STYLES = ("-", "--", ":", "-.")


def draw_comparison(results: Results, path: Path) -> None:
    """Draw every entry's mean curve over seeds, with a band from the lowest to the highest.

    Args:
        results: what was found so far.
        path: the picture to write, a PNG.

    Raises:
        UserError: the disk is full.
    """
    figure = Figure(figsize=(13, 6), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, entry in enumerate(results.entries):
        colour, style = colours[number % 10], STYLES[number // 10 % len(STYLES)]
        _draw(by_tokens, entry, "tokens", colour, style)
        _draw(by_time, entry, "seconds", colour, style)
    for axes, name in ((by_tokens, "training and calibration tokens"), (by_time, "seconds")):
        if results.teacher_held_out_lm is not None:
            axes.axhline(
                results.teacher_held_out_lm, color="black", linestyle="--", label="teacher"
            )
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    start = results.highest_start()
    if start is not None:
        by_tokens.set_ylim(top=1.05 * start)
    by_tokens.set_ylabel("held-out LM loss (nats)")
    handles, labels = by_tokens.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper")
    with new_file(path) as temporary, matplotlib.rc_context({"savefig.dpi": 130}):
        figure.savefig(temporary, format="png")


def _draw(
    axes: Axes, entry: EntryResult, along: str, colour: tuple[float, ...], style: str
) -> None:
    curve = entry.curve()
    if curve is None:
        return
    x = getattr(curve, along)
    axes.plot(x, curve.loss, color=colour, linestyle=style, marker=".", label=entry.name)
    axes.fill_between(x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
