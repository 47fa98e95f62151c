"""`lrc compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lrc.cli.training import Settings, TeacherOption, Text
from lrc.recipe.shipped import find_yaml
from lrc.system.console import console, quiet_libraries


def compare(
    comparison: Annotated[
        str, typer.Argument(help="A comparison's YAML file, or a shipped one by its name.")
    ],
    settings: Settings = None,
    teacher: TeacherOption = None,
    text: Text = None,
    out: Annotated[
        Path | None, typer.Option(help="The comparison's folder; default: below runs/.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run this entry alone, for now; can be given several times."),
    ] = None,
) -> None:
    """Train several systems on the same budget, each at its best learning rate, and tabulate them.

    Examples:

    * `lrc compare fast`
    * `lrc compare initialization --text corpus/ --out runs/starts`
    * `lrc compare mine.yaml --set train.micro_batch=4`

    Entries can be run side by side by processes with the same `--out`, each with its own `--only`.
    The same command goes on where it was stopped, and only tabulates where nothing is left to run.
    """
    from lrc.recipe import parse_overrides

    flags: dict[str, tuple[str, Any]] = {
        "teacher.model": ("--teacher", teacher),
        "data.text": ("--text", text),
    }
    overrides = parse_overrides(settings or [], flags)
    find_yaml(comparison, "comparison")  # a typo is told before torch is imported
    from lrc.comparison import compare, load_comparison
    from lrc.system.memory import keep_freed_memory
    from lrc.train.session import Interrupted

    quiet_libraries()
    keep_freed_memory()
    folder = out or Path("runs") / f"compare-{Path(comparison).stem}"
    try:
        compare(load_comparison(comparison, overrides), folder, console, only or ())
    except Interrupted as stop:
        console.print(str(stop))
        raise typer.Exit(128 + stop.signal) from None
