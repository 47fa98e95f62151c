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
    starts = [run.curve[0].loss for entry in results.entries for run in entry.runs if run.curve]
    if starts:  # what climbs above every start would flatten the rest
        by_tokens.set_ylim(top=1.05 * max(starts))
    by_tokens.set_ylabel("held-out LM loss (nats)")
    handles, labels = by_tokens.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper")
    with new_file(path) as temporary, matplotlib.rc_context({"savefig.dpi": 130}):
        figure.savefig(temporary, format="png")


def _draw(
    axes: Axes, entry: EntryResult, along: str, colour: tuple[float, ...], style: str
) -> None:
    curves = [run.curve for run in entry.runs if run.curve]
    if not curves:
        return
    steps = list(zip(*curves, strict=False))  # a run whose loss was not finite ends early
    x = [sum(getattr(p, along) for p in points) / len(points) for points in steps]
    losses = [[point.loss for point in points] for points in steps]
    mean = [sum(values) / len(values) for values in losses]
    axes.plot(x, mean, color=colour, linestyle=style, marker=".", label=entry.name)
    if len(curves) > 1:
        low, high = [min(v) for v in losses], [max(v) for v in losses]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
