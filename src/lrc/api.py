"""The Python interface: a clone in one call."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lrc.console import TextConsole
from lrc.recipe import Recipe, make_recipe
from lrc.run import Run
from lrc.teacher import Teacher, short_name
from lrc.train import need_whole_teacher, train


def clone(
    teacher: str | Teacher,
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
        hidden_size: d_S, even and smaller than the teacher's.
        text: sources of the training text: files, folders, or `stdlib-docs`; None: `settings` name
            shards or a stream instead.
        out: the run's folder; default: a new one below `runs/`.
        settings: other settings of the recipe by dotted key, `{"train.tokens": 500_000}`.
        quiet: print nothing.

    Returns:
        The run; `run.student()` is the model and `run.summary()` its figures.

    Raises:
        UserError: a setting, the teacher or the text is not usable.
    """
    loaded = teacher if isinstance(teacher, Teacher) else None
    recipe = make_recipe(
        {
            "teacher": {"model": loaded.name if loaded else teacher},
            "student": {"hidden_size": hidden_size},
            "data": {"text": text or []},
        },
        settings or {},
    )
    need_whole_teacher(recipe)
    run = Run.create(Path(out) if out else default_folder(recipe), recipe)
    train(run, TextConsole(quiet=quiet), loaded, report=not quiet)
    return run


def default_folder(recipe: Recipe, name: str | None = None) -> Path:
    """A new folder below `runs/`, named after the recipe or the teacher, and the time."""
    name = name or short_name(recipe.teacher.model)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{name}-{recipe.student.hidden_size}-{stamp}"
