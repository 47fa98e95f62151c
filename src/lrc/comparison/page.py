"""A comparison as a self-contained HTML page, like the page of runs."""

import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lrc.comparison.curves import comparison_title, curve_charts
from lrc.comparison.folders import Folders
from lrc.comparison.plan import Comparison, load_comparison
from lrc.comparison.results import Results, collect
from lrc.comparison.table import header, notes, rate_grid, rows
from lrc.model.locate import short_name
from lrc.recipe import flatten
from lrc.report.charts import LARGE, Series, legend
from lrc.report.contents import PageTable, headline, machines, written
from lrc.report.page import Progress, check_path, pictures, write_page
from lrc.report.runs import read_runs
from lrc.run import Run
from lrc.system.errors import UserError
from lrc.system.files import reading

PLAN = "comparison.yaml"
"""The file that marks the folder of a comparison."""


def is_comparison(folder: Path) -> bool:
    """Whether a folder holds a comparison."""
    return (folder / PLAN).is_file()


def write_comparison_page(folder: Path, path: Path, progress: Progress = lambda text: None) -> None:
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
        ended = [run for entry in results.entries for run in entry.runs]
        if not ended:
            raise UserError(
                f"No run of {folder} has ended yet; start or continue it with `lrc compare`."
            )
        views = read_runs([Run.open(folder / run.folder) for run in ended])
        machine = machines(view.environment() for view in views)
    progress("drawing")
    write_page("comparison", {**_values(comparison, results), "machines": machine}, path)


def _values(comparison: Comparison, results: Results) -> dict[str, Any]:
    assert isinstance(comparison.recipe, dict)
    series = {entry.name: Series(entry.name, i) for i, entry in enumerate(results.entries)}
    best = min(results.entries, key=lambda entry: entry.mean("held_out_lm") or math.inf)
    entries = len(series)
    several = len(comparison.all_seeds()) > 1
    charts = curve_charts(results)
    rates, tries = rate_grid(results)
    return {
        "title": comparison_title(comparison, results),
        "about": f"{entries} entr{'y' if entries == 1 else 'ies'} on {comparison.tokens:,} training"
        f" tokens each, with {short_name(comparison.recipe['teacher']['model'])} as the teacher."
        + (" Curves are means over seeds, with their range." if several else ""),
        "best": series[best.name],
        "headline": headline(
            (results.teacher_parameters, best.parameters),
            (results.teacher_held_out_lm, best.mean("held_out_lm")),
            best.mean("top1_agreement"),
            best.tokens,
            best.seconds(),
        ),
        "held_out": pictures(charts[:1], charts[1:], LARGE),
        "legend": legend(charts),
        "results": PageTable(
            header(results)[1:], [(series.get(row[0], row[0]), row[1:]) for row in rows(results)]
        ),
        "notes": notes(results),
        "rates": PageTable(
            rates,
            [
                (
                    series[name],
                    [
                        Markup(f"<strong>{cell}</strong>") if chosen else cell
                        for cell, chosen in row
                    ],
                )
                for name, row in tries
            ],
        ),
        "grid_tokens": results.grid_tokens,
        "entries": PageTable(
            ["method", "differs from the base in", "runs"],
            [
                (
                    series[entry.name],
                    [
                        entry.method,
                        "\n".join(f"{k}: {written(v)}" for k, v in flatten(entry.settings).items()),
                        "\n".join(run.folder for run in entry.runs),
                    ],
                )
                for entry in results.entries
            ],
        ),
        "settings": PageTable(
            [], [(key, [written(value)]) for key, value in flatten(comparison.recipe).items()]
        ),
    }
