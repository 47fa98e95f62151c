"""`lrc report`."""

from pathlib import Path
from typing import Annotated

import typer

from lrc.cli.console import console, quiet_libraries


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, ended or not.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page; default: report.html in the run's folder, or here for several runs."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text that the students are to continue. May be given again."),
    ] = None,
) -> None:
    """Write one HTML page of one or several runs, which needs no network to be read.

    It holds results, losses over tokens and over time, the clone loss by layer and term,
    throughput, evaluations beside the published ones, samples, shapes and the recipe. Several runs
    are overlaid.

    Examples:

    * `lrc report runs/mine`
    * `lrc report runs/first runs/second --out comparison.html --prompt "Once upon a time"`
    """
    from lrc.report.page import write_report
    from lrc.run import Run
    from lrc.train.progress import phase

    quiet_libraries()
    path = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    opened = [Run.open(folder) for folder in runs]
    with phase(console, f"Writing {path}") as detail:
        write_report(opened, path, prompt or (), detail)
    console.print(f"The report is in {path}.", highlight=False, soft_wrap=True)
