"""Exporting the student of a run from its newest checkpoint."""

from pathlib import Path

import torch
from rich.console import Console

from lrc.errors import UserError
from lrc.export.card import model_card
from lrc.export.plain import export_student
from lrc.files import is_taken
from lrc.run import Run
from lrc.train.checkpoint import list_checkpoints
from lrc.train.setup import set_up


def export_run(run: Run, folder: Path, console: Console, dtype: torch.dtype | None = None) -> int:
    """Write the plain student of a run, whether it has ended or not.

    Args:
        run: the run.
        folder: a folder that does not exist yet, or is empty.
        console: where a damaged checkpoint is told.
        dtype: element type of the written weights; None: the student's own.

    Returns:
        The step of the checkpoint that was used.

    Raises:
        UserError: the run has no checkpoint, the folder is taken, or the disk is full.
    """
    if is_taken(folder):
        raise UserError(f"{folder} already exists: choose a new folder for the student.")
    if not list_checkpoints(run.checkpoints):
        raise UserError(f"{run.folder} has no checkpoint yet; continue it with `lrc resume`.")
    setup = set_up(run, console)
    student = setup.method.student()
    card = model_card(run, setup.teacher, student)
    export_student(student, setup.teacher.tokenizer, card, folder, dtype)
    return setup.state.step
