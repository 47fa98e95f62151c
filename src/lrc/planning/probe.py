"""Measure candidates: solve the start of each on a little text, and train it for a while."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from lrc.model.teacher import load_teacher
from lrc.recipe import Recipe
from lrc.run import Run
from lrc.system.errors import UserError
from lrc.system.progress import task
from lrc.train.session import Interrupted, initialize_only, train
from lrc.train.setup import find_device


def probe(recipes: Sequence[Recipe], tokens: int = 0) -> tuple[float, list[float | str]]:
    """Measure the students of recipes that differ only in the student.

    Args:
        recipes: the recipes, with the calibration tokens of the probe.
        tokens: training tokens of each; 0: the start alone.

    Returns:
        The held-out LM loss of the teacher, and of each student; instead of a loss, the reason why
        it cannot be made.

    Raises:
        UserError: if the teacher or the text is not usable, or none of the students can be made.
    """
    first = recipes[0]
    teacher = load_teacher(first.teacher, find_device(first.train.device))
    losses: list[float | str] = []
    teacher_loss = float("nan")
    reason: UserError | None = None
    with (
        task("Measuring candidates", len(recipes)) as shown,
        tempfile.TemporaryDirectory(prefix="lrc-plan-") as folder,
    ):
        for number, recipe in enumerate(recipes):
            run = Run.create(Path(folder) / str(number), recipe)
            try:
                summary = (train if tokens else initialize_only)(run, teacher)
            except Interrupted:
                raise KeyboardInterrupt from None  # the folder goes: nothing can be continued
            except UserError as error:
                reason = error
                losses.append(str(error))
                continue
            losses.append(float(summary["student_held_out_lm"]))
            teacher_loss = float(summary["teacher_held_out_lm"])
            shown.update(number + 1, len(recipes))
    if reason and not any(isinstance(loss, float) for loss in losses):
        raise reason
    return teacher_loss, losses
