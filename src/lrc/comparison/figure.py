"""The overlaid held-out curves of a comparison, over tokens and over time."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from lrc.comparison.results import Results
from lrc.report.pictures import save_picture

STYLES = ("-", "--", ":", "-.")


def draw_comparison(results: Results, path: Path) -> None:
    """Draw every entry's mean curve over seeds, as `comparison_figure` does.

    Args:
        results: the results so far.
        path: the PNG to write.

    Raises:
        UserError: if the disk is full.
    """
    figure = comparison_figure(results)
    save_picture(figure, path)


def comparison_figure(results: Results) -> Figure:
    """Every entry's mean curve over seeds, with a band from the lowest to the highest.

    The figure shows the loss minus the teacher's loss on a logarithmic scale, so that high initial
    losses do not flatten small differences at the end. It shows the loss itself if the teacher's
    loss is not known or a student is better.

    Args:
        results: the results so far.
    """
    figure = Figure(figsize=(13, 6), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    colors = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    curves = [entry.curve() for entry in results.entries]
    teacher = results.teacher_held_out_lm
    lowest = min((min(curve.low) for curve in curves if curve), default=0.0)
    floor = teacher if teacher is not None and teacher < lowest else 0.0
    above = floor > 0
    for number, (entry, curve) in enumerate(zip(results.entries, curves, strict=True)):
        if curve is None:
            continue
        color, style = colors[number % 10], STYLES[number // 10 % len(STYLES)]
        loss, low, high = ([y - floor for y in ys] for ys in (curve.loss, curve.low, curve.high))
        for axes, x in ((by_tokens, curve.tokens), (by_time, curve.seconds)):
            axes.plot(x, loss, color=color, linestyle=style, marker=".", label=entry.name)
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    for axes, name in ((by_tokens, "training and calibration tokens"), (by_time, "seconds")):
        if teacher is not None and not above:
            axes.axhline(teacher, color="black", linestyle="--", label="teacher")
        axes.set_xlabel(name)
        axes.grid(alpha=0.3, which="both")
    if above:
        by_tokens.set_yscale("log")
        by_tokens.yaxis.set_major_formatter("{x:g}")
        by_tokens.yaxis.set_minor_formatter("{x:g}")
    start = results.highest_start()
    if start is not None:
        by_tokens.set_ylim(top=1.05 * (start - floor))
    by_tokens.set_ylabel(f"held-out LM loss{' above the teacher' if above else ''} (nats)")
    handles, labels = by_tokens.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper")
    return figure
