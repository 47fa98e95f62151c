"""The recipe to prune a finished model: `llm-pruner` with the model as its own teacher."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrc.model.teacher import load_skeleton
from lrc.recipe import Recipe, make_recipe
from lrc.run import Run, is_run
from lrc.system.errors import UserError

OF_THE_RUN = ("device", "precision", "micro_batch", "accumulate", "eval_sequences", "seed")
"""Training settings to copy from the run whose student is pruned: those of the machine, and those
that make held-out losses comparable."""


def prune_recipe(
    model: str, recover: str | None, tokens: int | None, settings: Mapping[str, Any]
) -> Recipe:
    """The recipe of a run that prunes a model.

    Args:
        model: a run's folder, to prune its student, or any model, named like a teacher.
        recover: what to train afterwards, `full` or `lora`; None: nothing.
        tokens: training tokens of the recovery.
        settings: recipe settings by dotted key, `method.ratio` and, if given, the text and those
            above among them.

    Raises:
        UserError: if the model is not found, there is no text, or a setting is not usable.
    """
    if recover and tokens is None:
        raise UserError("Recovery needs a token budget: give --tokens, or omit --recover.")
    if tokens is not None and not recover:
        raise UserError("--tokens is only for recovery: add --recover lora or --recover full.")
    base: dict[str, Any] = {"data": {}, "train": {}}
    if is_run(Path(model)):
        run = Run.open(Path(model))
        model = str(run.need_student())
        trained = run.recipe.model_dump(mode="json", exclude_defaults=True)
        base["data"] = trained["data"]
        base["train"] = {k: v for k, v in trained.get("train", {}).items() if k in OF_THE_RUN}
    hidden_size = int(load_skeleton(model).config.hidden_size)
    if not (base["data"] or any(key.startswith("data.") for key in settings)):
        raise UserError(
            f"{model} is not a run, so pruning needs text to measure importance: give --text."
        )
    if recover == "lora":
        base["train"]["optimizer"] = "adamw"  # as published; Muon was not tried on adapters
    base |= {
        "method": {"name": "llm-pruner", "recovery": "full"},
        "teacher": {"model": model},
        "student": {"hidden_size": hidden_size},
    }
    return make_recipe(base, settings)
