"""The Python interface: a clone in one call."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrc.model.teacher import Teacher
from lrc.preflight import check_recipe, need_whole_teacher
from lrc.recipe import make_recipe
from lrc.run import Run, default_folder
from lrc.system.console import TextConsole
from lrc.system.errors import UserError
from lrc.train import train


def clone(
    teacher: str | os.PathLike[str] | Teacher,
    *,
    hidden_size: int,
    text: str | Sequence[str] | None = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Run:
    """Clone a teacher into a student of a smaller hidden size.

    Args:
        teacher: a hub id, a folder, a .gguf file, `package:NAME`, or a loaded `lrc.Teacher`.
        hidden_size: d_S; even, and smaller than the teacher's.
        text: sources of the training text: files, folders, or `stdlib-docs`; None if `settings`
            name shards or a stream instead.
        out: the run's folder; default: a new one in `runs/`.
        settings: other recipe settings by dotted key, such as `{"train.tokens": 500_000}`.
        quiet: whether to print nothing.

    Returns:
        The run; `run.student()` is the model and `run.summary()` its figures.

    Raises:
        UserError: if a setting, the teacher or the text is not usable.
    """
    loaded = teacher if isinstance(teacher, Teacher) else None
    if loaded is None and not isinstance(teacher, str | os.PathLike):
        raise UserError(
            f"The teacher is a {type(teacher).__name__}. Give its name or folder, or wrap a loaded "
            "model with lrc.as_teacher(model, tokenizer, name)."
        )
    name = loaded.name if loaded else os.fspath(teacher)  # type: ignore[arg-type]
    recipe = make_recipe(
        {
            "teacher": {"model": name},
            "student": {"hidden_size": hidden_size},
            "data": {"text": text or []},
        },
        settings or {},
    )
    need_whole_teacher(recipe)
    run = Run.create(Path(out) if out else default_folder(recipe), recipe)
    if loaded is None:
        check_recipe(recipe)
    train(run, TextConsole(quiet=quiet), loaded, report=not quiet)
    return run
