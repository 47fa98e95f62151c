"""`lrc sft`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lrc.cli.console import quiet_libraries
from lrc.cli.models import ModelArgument
from lrc.cli.results import prints_results
from lrc.cli.training import Settings, carry_out_tuning


@prints_results
def sft(
    model: ModelArgument,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Conversations: a .jsonl file or a data set of the hub. Can be repeated."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="A YAML file with settings, or a shipped one (`ultrachat-sft`)."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Learn also from this model's predictions for the answers.")
    ] = None,
    on_policy: Annotated[
        bool,
        typer.Option("--on-policy", help="Learn from the teacher on answers of the student's own."),
    ] = False,
    lora: Annotated[
        int | None, typer.Option(min=1, help="Train LoRA adapters of this rank and merge them.")
    ] = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the result; default: a new one below runs/.")
    ] = None,
) -> None:
    """Tune a student on conversations, so that it answers (supervised fine-tuning with TRL).

    Examples:

    * `lrc sft runs/mine --data chat.jsonl --out runs/assistant`
    * `lrc sft runs/mine --data chat.jsonl --teacher Qwen/Qwen3-1.7B` (learn from it as well)
    * `lrc sft runs/mine --recipe ultrachat-sft` (the paper's)
    * `lrc sft runs/mine --data chat.jsonl --lora 16 --set epochs=2 --set packing=true`

    The loss counts only the assistant's answers. Rows hold `messages` (`role`, `content`) or
    `conversations` (`from`, `value`). The tuned model is a plain transformers folder, `student/`
    in OUT, and all other commands take OUT as a model. Ctrl-C writes a checkpoint; the same
    command, or `lrc resume OUT`, continues.
    """
    from lrc.recipe import parse_overrides
    from lrc.tuning.settings import load_tuning

    quiet_libraries()
    flags: dict[str, tuple[str, Any]] = {
        "model": ("MODEL", model),
        "data": ("--data", data),
        "teacher": ("--teacher", teacher),
        "on_policy": ("--on-policy", on_policy or None),
        "lora_rank": ("--lora", lora),
    }
    tuning = load_tuning(recipe, parse_overrides(settings or [], flags))
    from lrc.tuning.sft import default_folder

    carry_out_tuning(tuning, out or default_folder(model))
