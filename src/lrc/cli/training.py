"""`lrc train`, `lrc compress` and `lrc resume`."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrc.cli.console import INTERRUPTED, console, quiet_libraries
from lrc.cli.quantities import COUNTS, quantity
from lrc.cli.results import prints_results
from lrc.system.errors import UserError
from lrc.system.files import is_taken
from lrc.system.tables import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lrc.run import Run
    from lrc.tuning.settings import Tuning


RecipeArgument = Annotated[
    str | None, typer.Argument(help="A recipe's YAML file, or the name of a shipped one.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting that overrides the recipe's."),
]
TeacherOption = Annotated[
    str | None, typer.Option(help="Hub id, folder, .gguf file or package:NAME.")
]
HiddenSize = Annotated[int | None, typer.Option(help="The student's hidden size.")]
Params = Annotated[
    str | None,
    typer.Option(help="The student's parameters, 800M, in the shape that `lrc plan` ranks first."),
]
Ratio = Annotated[
    float | None, typer.Option(help="The same as a share of the teacher's parameters: 0.5.")
]
Text = Annotated[
    list[str] | None, typer.Option(help="Text to learn from: file, folder or stdlib-docs.")
]
MethodOption = Annotated[
    str | None, typer.Option("--method", help="How the student is made and trained; default: lrc.")
]
Out = Annotated[Path | None, typer.Option(help="The run's folder; default: a new one below runs/.")]


@prints_results
def train(
    recipe: RecipeArgument = None,
    settings: Settings = None,
    teacher: TeacherOption = None,
    hidden_size: HiddenSize = None,
    params: Params = None,
    ratio: Ratio = None,
    text: Text = None,
    method: MethodOption = None,
    out: Out = None,
) -> None:
    """Clone a teacher: train a student, export it, and measure it beside its teacher.

    Examples:

    * `lrc train quickstart`
    * `lrc train my.yaml --set train.tokens=2000000 --set objective.alpha=0.1`
    * `lrc train --teacher ./Qwen3-1.7B --params 800M --text corpus.jsonl.gz`
    * `lrc train --teacher ./Qwen3-1.7B --hidden-size 1024 --text corpus.jsonl.gz`
    * `lrc train my.yaml --method scratch`
    * `lrc train my.yaml --set data.shards=tokens/mixed` (made by `lrc data build`)
    * `lrc train my.yaml --set data.stream.dataset=HuggingFaceFW/fineweb-edu` (no build)

    Ctrl-C stops the run after the current step and writes a checkpoint for `lrc resume`.
    """
    from lrc.preflight import need_whole_teacher

    run = _new_run(recipe, settings, teacher, hidden_size, params, ratio, text, method, out)
    need_whole_teacher(run.recipe)
    from lrc.train.session import train

    carry_out(run, train)


@prints_results
def compress(
    recipe: RecipeArgument = None,
    settings: Settings = None,
    teacher: TeacherOption = None,
    hidden_size: HiddenSize = None,
    params: Params = None,
    ratio: Ratio = None,
    text: Text = None,
    method: MethodOption = None,
    out: Out = None,
) -> None:
    """Compress without training: initialize a student, export it and measure it.

    Examples:

    * `lrc compress quickstart`
    * `lrc compress my.yaml --set initialize.calibration_tokens=65536 --out runs/start`
    * `lrc compress my.yaml --set teacher.load=layers` (a teacher larger than memory)

    `lrc resume` then trains the student.
    """
    _compress(recipe, settings, teacher, hidden_size, params, ratio, text, method, out)


def _compress(*given: Any) -> None:
    run = _new_run(*given)
    from lrc.train.session import initialize_only

    carry_out(run, initialize_only)


@prints_results
def resume(
    run: Annotated[Path, typer.Argument(help="The folder of a stopped run or tuning.")],
) -> None:
    """Continue a run or a tuning from its newest intact checkpoint, exactly where it stopped.

    Example: `lrc resume runs/quickstart-288-20260101-120000`
    """
    from lrc.run import Run
    from lrc.tuning.settings import is_tuning, open_tuning

    if is_tuning(run):
        carry_out_tuning(open_tuning(run), run)
        return

    opened = Run.open(run)
    from lrc.train.session import train

    carry_out(opened, train)


def _new_run(
    recipe: str | None,
    settings: list[str] | None,
    teacher: str | None,
    hidden_size: int | None,
    params: str | None,
    ratio: float | None,
    text: list[str] | None,
    method: str | None,
    out: Path | None,
) -> "Run":
    """Set up the new run that the options of a command ask for.

    Everything that can be checked without torch is checked here: reporting a typo should not take
    seconds.
    """
    from lrc.preflight import check_recipe
    from lrc.recipe import make_recipe, parse_overrides
    from lrc.recipe.recipe import names_text
    from lrc.recipe.shipped import find_yaml
    from lrc.run import Run, default_folder
    from lrc.system.distributed import join, may_restart
    from lrc.system.yaml_files import read_yaml

    flags: dict[str, tuple[str, Any]] = {
        "method": ("--method", method),
        "teacher.model": ("--teacher", teacher),
        "student.hidden_size": ("--hidden-size", hidden_size),
        "data.text": ("--text", text),
    }
    overrides = parse_overrides(settings or [], flags)
    size = params is not None or ratio is not None
    given = (
        any(key in ("teacher", "teacher.model") for key in overrides),
        size or any(f"{key}.".startswith("student.") for key in overrides),
        names_text(overrides),
    )
    if recipe is None and not all(given):
        raise UserError(
            "Give a recipe, or --teacher, --text and one of --params, --ratio and --hidden-size "
            "(`lrc train quickstart` runs a shipped recipe)."
        )
    base = read_yaml(find_yaml(recipe, "recipe")) if recipe else {}
    if size:
        parameters = None if params is None else quantity(params, COUNTS, "--params")
        from lrc.planning.recommend import with_shape

        overrides = with_shape(base, overrides, parameters, ratio)
    resolved = make_recipe(base, overrides)
    name = Path(recipe).stem if recipe else None
    world = join()
    if out is None and may_restart():
        raise UserError(
            "A launcher that restarts processes needs --out: otherwise they would choose another "
            "folder each time."
        )
    run = Run.create(out or default_folder(resolved, name), resolved, world)
    check_recipe(resolved)
    return run


def carry_out(run: "Run", action: "Callable[[Run], dict[str, Any]]", shapes: bool = False) -> None:
    """Train or initialize a run and print its closing table, and the shapes if wanted.

    If a signal stops it, exit with 128 + the signal's number.
    """
    from lrc.system.memory import keep_freed_memory
    from lrc.train.closing import closing_table

    quiet_libraries()
    keep_freed_memory()
    with stoppable(run.folder):
        summary = action(run)
    samples = [f"{name.title():8} {text}" for name, text in summary["samples"].items()]
    shares = [f"{name} {share:.0%}" for name, share in summary["time_shares"].items()]
    console.result(
        {"folder": str(run.folder), "student": str(run.student_folder), **summary},
        "",
        *samples,
        closing_table(summary),
        *(["Time: " + ", ".join(shares)] if shares else []),
        f"Everything is in {run.folder}; the student is in {run.student_folder}.",
        *([_shapes_table(summary["shapes"])] if shapes else []),
    )


def _shapes_table(shapes: dict[str, dict[str, Any]]) -> Table:
    table = Table(["", "before", "after"])
    for name, value in shapes["teacher"].items():
        table.add_row(name, str(value), str(shapes["student"][name]))
    return table


def carry_out_tuning(tuning: "Tuning", folder: Path) -> None:
    """Tune a model and print the final table, as `carry_out` does."""
    from lrc.tuning.sft import STUDENT, closing_table, sft

    quiet_libraries()
    with stoppable(folder):
        summary = sft(tuning, folder)
    data = {"folder": str(folder), "student": str(folder / STUDENT), **summary}
    console.result(data, closing_table(summary), f"The tuned model is in {folder / STUDENT}.")


@contextmanager
def stoppable(folder: Path) -> "Iterator[None]":
    """Exit with 128 + the signal's number if a signal stops the block after a checkpoint, or Ctrl-C
    stops it before or after training."""
    from lrc.train.session import Interrupted

    try:
        yield
    except Interrupted as stop:
        console.print(str(stop))
        raise typer.Exit(128 + stop.signal) from None
    except KeyboardInterrupt:
        if not is_taken(folder):
            raise
        console.print(f"Stopped; continue with `lrc resume {folder}`.")
        raise typer.Exit(INTERRUPTED) from None
