"""`lrc report`."""

from pathlib import Path
from typing import Annotated

import typer

from lrc.cli.console import console, quiet_libraries


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of runs, finished or not, or the folder of one comparison or tuning."
        ),
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
    and over time, and the grid of learning rates, that of a tuning its losses on the answers.

    Examples:

    * `lrc report runs/mine`
    * `lrc report runs/first runs/second --out comparison.html --prompt "Once upon a time"`
    * `lrc report runs/compare-fast` (made by `lrc compare`)
    * `lrc report runs/assistant` (made by `lrc sft`)
    """
    quiet_libraries()
    from lrc.api import write_report

    path = write_report(runs, out=out, prompts=prompt or ())
    console.print(f"The report is in {path}.")
