"""`lrc compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lrc.cli.console import console, quiet_libraries
from lrc.cli.results import prints_results
from lrc.cli.training import TeacherOption, Text
from lrc.system.distributed import launched
from lrc.system.errors import UserError


@prints_results
def compare(
    comparison: Annotated[
        str, typer.Argument(help="A comparison's YAML file, or the name of a shipped one.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting that overrides the recipe's, or tokens, seeds, grid or thresholds.",
        ),
    ] = None,
    teacher: TeacherOption = None,
    text: Text = None,
    out: Annotated[
        Path | None, typer.Option(help="The comparison's folder; default: one below runs/.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run only this entry for now; can be repeated."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="Stop after this time, with checkpoints to continue from."),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Processes that run entries side by side.")
    ] = None,
    results_only: Annotated[
        bool,
        typer.Option(
            "--results-only",
            help="Keep only the recipes, held-out losses and summaries of finished runs, small "
            "enough for git: no students, no checkpoints.",
        ),
    ] = False,
) -> None:
    """Train several systems on the same budget, each at its best learning rate, and tabulate them.

    Examples:

    * `lrc compare fast`
    * `lrc compare initialization --text corpus/ --out runs/starts`
    * `lrc compare mine.yaml --set train.micro_batch=4 --set seeds=[0]`
    * `lrc compare proof-cpu --minutes 60 --parallel 2 --results-only --out results/proof-cpu`

    The most important runs come first: seed by seed, and for each seed the entries in their order.
    Several processes with the same `--out` share the runs, such as one for each GPU. The same
    command continues where it was stopped. If nothing is left to run, it only tabulates.
    """
    from lrc.recipe import parse_overrides
    from lrc.recipe.shipped import find_yaml

    if launched() > 1:
        raise UserError(
            "A comparison divides its runs among processes, not the steps of a run: start it "
            "without a launcher, and with --parallel."
        )
    flags: dict[str, tuple[str, Any]] = {
        "teacher.model": ("--teacher", teacher),
        "data.text": ("--text", text),
    }
    overrides = parse_overrides(settings or [], flags)
    find_yaml(comparison, "comparison")  # report a typo before importing torch
    from lrc.comparison import compare, load_comparison
    from lrc.comparison.side_by_side import SideBySide
    from lrc.comparison.table import comparison_table
    from lrc.system.memory import keep_freed_memory
    from lrc.train.session import Interrupted

    quiet_libraries()
    keep_freed_memory()
    folder = out or Path("runs") / f"compare-{Path(comparison).stem}"
    alone = minutes is None and parallel is None
    side_by_side = None if alone else SideBySide(parallel or 1, minutes)
    try:
        loaded = load_comparison(comparison, overrides)
        results = compare(loaded, folder, only or (), results_only, side_by_side)
    except Interrupted as stop:
        console.print(str(stop))
        raise typer.Exit(128 + stop.signal) from None
    data = {"folder": str(folder), **results.as_json()}
    console.result(data, comparison_table(results), f"Everything is in {folder}.")
