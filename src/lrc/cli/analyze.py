"""`lrc analyze neurons`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lrc.cli.console import console, quiet_libraries
from lrc.cli.models import ModelArgument, TorchDtype
from lrc.cli.quantities import MAX_SEED
from lrc.cli.results import prints_results
from lrc.system.errors import UserError

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def analyze() -> None:
    """Analyze what a student inherited from its teacher."""


class Positions(StrEnum):
    """Which tokens of a prompt count."""

    all = "all"
    last = "last"


@app.command(no_args_is_help=True)
@prints_results
def neurons(
    model: ModelArgument,
    teacher: Annotated[str | None, typer.Option(help="The teacher; default: the run's.")] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="A JSONL file of questions: `question`, `answer` and, optionally, `choices`."
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(help="A task of lm-evaluation-harness, used without --questions.")
    ] = "sciq",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with TASK.jsonl, instead of the hub, as for `lrc eval`."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Use only this many questions.")] = None,
    count: Annotated[
        int | None,
        typer.Option("--neurons", min=1, help="FFN neurons to mask.", show_default="50"),
    ] = None,
    share: Annotated[
        float | None, typer.Option(min=0, max=0.5, help="Share of all FFN neurons to mask instead.")
    ] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Mask that many per layer, not per model.")
    ] = False,
    positions: Annotated[
        Positions,
        typer.Option(help="Tokens of a question to average activity over: all, or the last."),
    ] = Positions.all,
    random_draws: Annotated[
        int, typer.Option(min=0, help="Random sets of as many neurons to mask, to compare.")
    ] = 3,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the split and of the draws.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results; default: `analysis` in the run's folder, or a folder "
            "below analyses/."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 16,
    dtype: Annotated[
        TorchDtype | None, typer.Option(help="Element type of the models; default: as stored.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Mask the FFN neurons that are most active on factual questions, in teacher and student.

    One half of the questions selects the teacher's neurons. Both models then run with these neurons
    masked, and with as many random ones masked. If the student keeps its teacher's knowledge in the
    same neurons, its accuracy falls as the teacher's does, and random ones change little (Table 5
    of the paper).

    Examples:

    * `lrc analyze neurons runs/mine`
    * `lrc analyze neurons runs/mine --data eval-data --limit 200`
    * `lrc analyze neurons my-student --teacher Qwen/Qwen3-1.7B --questions facts.jsonl`
    * `lrc analyze neurons runs/mine --share 0.002 --positions last --random-draws 5`
    """
    from lrc.analysis.neuron_tables import draw_layers, markdown, table
    from lrc.analysis.neurons import NeuronSettings, analyze_neurons
    from lrc.evaluation.evaluation import results_folder
    from lrc.system.files import write_text
    from lrc.system.memory import keep_freed_memory
    from lrc.train.setup import find_device

    quiet_libraries()
    keep_freed_memory()
    if share == 0:
        raise UserError("--share is 0: give a share above 0.")
    settings = NeuronSettings(
        task=task,
        questions=questions,
        data=data,
        limit=limit,
        neurons=count,
        share=share,
        per_layer=per_layer,
        positions=positions.value,
        random_draws=random_draws,
        seed=seed,
        batch_size=batch_size,
        dtype=dtype or "auto",
        device=str(find_device(device)),
    )
    folder = out or results_folder(model, "analysis", "analyses")
    result = analyze_neurons(model, teacher, settings, folder)
    write_text(folder / "neurons.md", markdown(result))
    draw_layers(result, folder / "neurons.png")
    where = f"neurons.json, neurons.md and neurons.png are in {folder}."
    found = {"folder": str(folder), **result.model_dump(mode="json")}
    console.result(found, table(result), where)
