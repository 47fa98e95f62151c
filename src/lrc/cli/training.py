"""`lrc train` and `lrc resume`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrc.cli.console import console, quiet_libraries
from lrc.errors import UserError

if TYPE_CHECKING:
    from lrc.run import Run


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe's YAML file, or a shipped one by its name.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting that wins over the recipe."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Hub id, folder, .gguf file or package:NAME.")
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(help="The student's hidden size.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Text to learn from: file, folder or stdlib-docs.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; default: a new one below runs/.")
    ] = None,
) -> None:
    """Clone a teacher: train a student, export it, and measure it beside its teacher.

    Examples:

    * `lrc train quickstart`
    * `lrc train my.yaml --set train.tokens=2000000 --set objective.alpha=0.1`
    * `lrc train --teacher ./Qwen3-1.7B --hidden-size 1024 --text corpus.jsonl.gz`

    Ctrl-C ends the run after its present step, with a checkpoint to `lrc resume` from.
    """
    from lrc.api import default_folder
    from lrc.recipe import find_recipe, make_recipe, parse_override, read_yaml
    from lrc.run import Run

    overrides = dict(parse_override(setting) for setting in settings or [])
    shorthands: dict[str, Any] = {
        "teacher.model": teacher,
        "student.hidden_size": hidden_size,
        "data.text": text,
    }
    overrides |= {key: value for key, value in shorthands.items() if value}
    if recipe is None and not all(shorthands.values()):
        raise UserError(
            "Give a recipe, or all three of --teacher, --hidden-size and --text "
            "(`lrc train quickstart` runs the shipped one)."
        )
    base = read_yaml(find_recipe(recipe)) if recipe else {}
    resolved = make_recipe(base, overrides)
    folder = out or default_folder(resolved, Path(recipe).stem if recipe else None)
    _run(Run.create(folder, resolved))


def resume(
    run: Annotated[Path, typer.Argument(help="The folder of a run that was stopped.")],
) -> None:
    """Continue a run from its newest checkpoint that is whole, exactly where it stopped.

    Example: `lrc resume runs/quickstart-288-20260101-120000`
    """
    from lrc.run import Run

    _run(Run.open(run))


def _run(run: "Run") -> None:
    from lrc.memory import keep_freed_memory
    from lrc.train.session import Interrupted, train

    quiet_libraries()
    keep_freed_memory()
    try:
        train(run, console)
    except Interrupted as stop:
        console.print(str(stop), highlight=False, soft_wrap=True)
        raise typer.Exit(128 + stop.signal) from None
