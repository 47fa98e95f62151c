"""A comparison as a self-contained HTML page, like the page of runs."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from lrc.comparison.folders import Folders
from lrc.comparison.plan import Comparison, load_comparison
from lrc.comparison.results import EntryResult, Results, collect
from lrc.comparison.table import header, notes, row
from lrc.model.teacher import short_name
from lrc.recipe import flatten
from lrc.report.charts import DASHES, LARGE, RUN_COLORS, Line, line_chart, run_color
from lrc.report.contents import NONE, time_unit, written
from lrc.report.page import check_path, color_variable, write_page
from lrc.system.errors import UserError
from lrc.system.files import reading

PLAN = "comparison.yaml"
"""The file that marks the folder of a comparison."""


def is_comparison(folder: Path) -> bool:
    """Whether a folder holds a comparison."""
    return (folder / PLAN).is_file()


def write_comparison_page(
    folder: Path, path: Path, progress: Callable[[str], None] = lambda text: None
) -> None:
    """Write the page of a comparison, ended or not.

    It shows the table with notes, the curves of all entries, the grid of learning rates, and the
    settings of the entries.

    Args:
        folder: the comparison's folder.
        path: the page; only an older report there is replaced.
        progress: called with the name of the current step.

    Raises:
        UserError: if no run has ended yet, the path is taken, or the page cannot be written.
    """
    check_path(path)
    progress("reading the runs")
    comparison = load_comparison(folder / PLAN)
    with reading(folder, "one of its runs may be damaged: remove that run, or restore it"):
        results = collect(Folders(comparison, folder))
    if not any(entry.runs for entry in results.entries):
        raise UserError(
            f"No run of {folder} has ended yet; start or continue it with `lrc compare`."
        )
    progress("drawing")
    template = (resources.files("lrc.comparison") / "page.html").read_text(encoding="utf-8")
    write_page(template, _values(folder.resolve().name, comparison, results), path)


def _values(title: str, comparison: Comparison, results: Results) -> dict[str, Any]:
    assert isinstance(comparison.recipe, dict)  # resolved by `load_comparison`
    return {
        "title": title,
        "tokens": comparison.tokens,
        "seeds": len(comparison.seeds),
        "teacher": short_name(comparison.recipe["teacher"]["model"]),
        "chips": {entry.name: _chip(number) for number, entry in enumerate(results.entries)},
        "header": header(results)[1:],
        "rows": [(entry.name, row(results, entry)[1:]) for entry in results.entries],
        "notes": notes(results),
        "charts": curve_charts(results),
        "grid": rate_grid(results),
        "grid_tokens": results.grid_tokens,
        "entries": [
            (entry.name, entry.method, _settings(entry), [run.folder for run in entry.runs])
            for entry in results.entries
        ],
        "recipe": [(name, written(value)) for name, value in flatten(comparison.recipe).items()],
    }


def curve_charts(results: Results) -> list[tuple[str, str]]:
    """Title and chart of the held-out loss over tokens and over time.

    Each chart shows every entry's mean, with a band from its lowest run to its highest.
    """
    curves = [(number, entry.curve()) for number, entry in enumerate(results.entries)]
    longest = max((max(curve.seconds) for _, curve in curves if curve), default=0.0)
    unit, name = time_unit(longest)
    start = results.highest_start()
    charts = []
    for title, label, over_time in (
        ("over tokens", "training and calibration tokens", False),
        ("over time", name, True),
    ):
        lines = [
            Line(
                results.entries[number].name,
                run_color(number),
                [second / unit for second in curve.seconds] if over_time else curve.tokens,
                curve.loss,
                results.teacher_held_out_lm,
                marked=True,
                band=(curve.low, curve.high),
                dash=_dash(number),
            )
            for number, curve in curves
            if curve
        ]
        top = None if start is None else 1.05 * start
        charts.append(
            (title, line_chart(f"held-out LM loss {title}", lines, label, False, LARGE, top))
        )
    return charts


def rate_grid(results: Results) -> tuple[list[str], list[tuple[str, list[tuple[str, bool]]]]]:
    """The tried learning rates, and one row for every entry that tried some.

    A row holds the held-out loss at each rate, and whether that rate was chosen.
    """
    searched = [entry for entry in results.entries if entry.tries]
    rates = sorted({rate for entry in searched for rate in entry.tries})
    rows = [
        (entry.name, [(_try(entry, rate), rate == entry.learning_rate) for rate in rates])
        for entry in searched
    ]
    return [f"{rate:g}" for rate in rates], rows


def _try(entry: EntryResult, rate: float) -> str:
    if rate not in entry.tries:
        return NONE
    loss = entry.tries[rate]
    return "not finite" if loss is None else f"{loss:.4f}"


def _chip(number: int) -> tuple[str, int]:
    """Color and line style of an entry, for the chip before its name."""
    return color_variable(run_color(number)), _dash(number)


def _dash(number: int) -> int:
    return number // len(RUN_COLORS) % len(DASHES)


def _settings(entry: EntryResult) -> list[str]:
    return [f"{name}: {written(value)}" for name, value in flatten(entry.settings).items()]
