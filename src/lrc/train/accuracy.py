"""Accuracy along a run: during training (`train.evaluate`), or afterwards from its checkpoints."""

import copy
import json
import logging
from typing import TYPE_CHECKING, Any

from lrc.evaluation.along import Benchmarks
from lrc.recipe.sections import EvaluateSection
from lrc.report.curves import ACCURACY, TEACHER_ACCURACY
from lrc.run import Run
from lrc.system.distributed import ALONE
from lrc.system.errors import UserError
from lrc.system.files import write_text
from lrc.system.progress import task
from lrc.system.tables import Table
from lrc.train.checkpoint import list_checkpoints, read_checkpoint
from lrc.train.inputs import check_inputs
from lrc.train.setup import fill_method, set_up

if TYPE_CHECKING:
    from lrc.train.loop import Loop

logger = logging.getLogger(__name__)

CHECKPOINTS = "accuracy.json"
"""File of the accuracies by checkpoint, in the run's folder."""


def accuracy(loop: "Loop") -> dict[str, Any]:
    """What `train.evaluate` asks for after a step, for its line of metrics; mostly nothing."""
    benchmarks, recipe, setup = loop.benchmarks, loop.run.recipe, loop.setup
    if benchmarks is None:
        return {}
    step, tokens = setup.state.step, loop.tokens()
    due = benchmarks.due(tokens - recipe.step_tokens(), tokens)
    if not (due or step in (0, recipe.steps())):
        return {}
    # The harness changes settings of the tokenizer, with which a thread may be reading text.
    tokenizer = copy.deepcopy(setup.teacher.tokenizer)
    with setup.method.clock.part("evaluation"):
        found = {ACCURACY: benchmarks.accuracy(setup.method.student(), tokenizer, loop.world)}
        if step == 0:
            # All processes must run a divided teacher equally often, so each measures all tasks.
            teacher, world = setup.teacher, ALONE if setup.teacher.sharded else loop.world
            found[TEACHER_ACCURACY] = benchmarks.accuracy(teacher.model, tokenizer, world)
    terms = ", ".join(f"{name} {value:.4g}" for name, value in found[ACCURACY].items())
    logger.info("step %d of %d, %s tokens: %s", step, recipe.steps(), f"{tokens:,}", terms)
    return found


def evaluate_checkpoints(run: Run, section: EvaluateSection) -> Table:
    """Measure the student of every kept checkpoint, and the teacher; write accuracy.json.

    Raises:
        UserError: if the run has no checkpoint that can be used, or a task or its data is missing.
    """
    benchmarks = Benchmarks(section)
    setup = set_up(run)
    if not setup.restored:
        raise UserError(f"{run.folder} has no checkpoint yet; continue it with `lrc resume`.")
    check_inputs(run, setup.teacher)
    tokenizer = setup.teacher.tokenizer
    settings = section.model_dump(mode="json", exclude={"every_tokens"})
    with task("Evaluating the teacher"):
        teacher = benchmarks.accuracy(setup.teacher.model, tokenizer)
    rows: list[dict[str, Any]] = []
    for path in reversed(list_checkpoints(run.checkpoints)):
        header, tensors = read_checkpoint(path, run.recipe.fingerprint())
        state = fill_method(setup.method, run.recipe, path, header, tensors)
        with task(f"Evaluating step {state.step}"):
            found = benchmarks.accuracy(setup.method.student(), tokenizer)
        tokens = state.step * run.recipe.step_tokens()
        rows.append({"step": state.step, "tokens": tokens, ACCURACY: found})
        content = {"settings": settings, "checkpoints": rows, TEACHER_ACCURACY: teacher}
        write_text(run.folder / CHECKPOINTS, json.dumps(content, indent=2) + "\n")
    table = Table(["training tokens", *teacher])
    for row in rows:
        table.add_row(f"{row['tokens']:,}", *(f"{value:.4f}" for value in row[ACCURACY].values()))
    table.add_row("teacher", *(f"{value:.4f}" for value in teacher.values()))
    return table
