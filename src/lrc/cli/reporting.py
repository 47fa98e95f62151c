"""`lrc report`."""

from pathlib import Path
from typing import Annotated

import typer

from lrc.cli.console import console, quiet_libraries
from lrc.system.errors import UserError


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs, finished or not, or the folder of one comparison."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page; default: report.html in the run's folder, or in the current folder for "
            "several runs."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text for the students to continue; can be repeated."),
    ] = None,
) -> None:
    """Write one HTML page about one or several runs, readable without a network.

    It shows results, losses over tokens and over time, the clone loss by layer and term,
    throughput, evaluations beside the published ones, samples, shapes and the recipe. Several runs
    are overlaid. The page of a comparison shows its table, the curves of all entries over tokens
    and over time, and the grid of learning rates.

    Examples:

    * `lrc report runs/mine`
    * `lrc report runs/first runs/second --out comparison.html --prompt "Once upon a time"`
    * `lrc report runs/compare-fast` (made by `lrc compare`)
    """
    from lrc.comparison.page import is_comparison, write_comparison_page
    from lrc.report.page import write_report
    from lrc.run import Run
    from lrc.system.progress import task

    quiet_libraries()
    path = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    comparisons = [folder for folder in runs if is_comparison(folder)]
    if comparisons:
        if len(runs) > 1 or prompt:
            raise UserError(
                f"{comparisons[0]} is a comparison, which has its own page: give it alone and "
                "without --prompt, or give its runs."
            )
        with task(f"Writing {path}") as shown:
            write_comparison_page(runs[0], path, shown.describe)
    else:
        opened = [Run.open(folder) for folder in runs]
        with task(f"Writing {path}") as shown:
            write_report(opened, path, prompt or (), shown.describe)
    console.print(f"The report is in {path}.")
