"""The held-out curves of a comparison, for its page and for its curves.png."""

from pathlib import Path

from lrc.comparison.plan import Comparison
from lrc.comparison.results import Results
from lrc.model.locate import short_name
from lrc.report.charts import Chart, Line, Series, save_charts
from lrc.report.curves import CHARTS, time_unit
from lrc.report.runs import title


def draw_comparison(comparison: Comparison, results: Results, path: Path) -> None:
    """Draw the charts of a comparison as a PNG, once a run has a measurement.

    Args:
        comparison: the comparison.
        results: its results so far.
        path: the PNG to write.

    Raises:
        UserError: if the disk is full.
    """
    if charts := curve_charts(results):
        save_charts(comparison_title(comparison, results), charts, path)


def comparison_title(comparison: Comparison, results: Results) -> str:
    """Teacher, and size of the entry that the others' sizes are compared with."""
    size = next(entry.parameters for entry in results.entries if entry.name == results.reference)
    entry = next(entry for entry in comparison.entries if entry.name == results.reference)
    recipe = comparison.grid_recipe(entry, 1.0)
    return title(short_name(recipe.teacher.model), size, recipe.student.hidden_size)


def curve_charts(results: Results) -> list[Chart]:
    """The held-out loss over tokens and over time; none without a measurement.

    Both show every entry's mean over seeds, with a band from its lowest run to its highest.
    """
    curves = {
        Series(entry.name, number): curve
        for number, entry in enumerate(results.entries)
        if (curve := entry.curve())
    }
    if not curves:
        return []
    unit, name = time_unit(max(max(curve.seconds) for curve in curves.values()))
    start = results.highest_start()
    return [
        Chart(
            CHARTS["held_out_lm"],
            [
                Line(
                    series,
                    [second / unit for second in curve.seconds] if over_time else curve.tokens,
                    curve.loss,
                    results.teacher_held_out_lm,
                    marked=True,
                    band=(curve.low, curve.high),
                )
                for series, curve in curves.items()
            ],
            label,
            logarithmic=True,
            top=None if start is None else 1.05 * start,
        )
        for label, over_time in (("training and calibration tokens", False), (name, True))
    ]
