"""Checks of a whole comparison before its first run."""

from collections.abc import Collection
from pathlib import Path

import torch

from lrc.comparison.folders import Folders, is_over
from lrc.comparison.plan import Comparison, by_entry
from lrc.data.sources import STDLIB_DOCS
from lrc.methods import METHODS
from lrc.model.locate import PACKAGE_PREFIX
from lrc.preflight import check_recipe
from lrc.system.errors import UserError
from lrc.train.sizes import Planned, planned_teacher


def need_inputs(comparison: Comparison) -> None:
    """Refuse a comparison whose teacher or text is missing, and say how to make it.

    Raises:
        UserError: if the teacher or the text is missing.
    """
    for entry in comparison.entries:
        recipe = comparison.grid_recipe(entry, 1e-4)
        if comparison.preparation:
            for name in (recipe.teacher.model, *recipe.data.text):
                local = not name.startswith(PACKAGE_PREFIX) and name != STDLIB_DOCS
                if local and not Path(name).exists():
                    raise UserError(
                        f"'{name}' does not exist: make it with `{comparison.preparation}`, or "
                        "name another one with --teacher and --text (docs/compare.md)."
                    )
        check_recipe(recipe)


def check_students(folders: Folders, names: Collection[str]) -> None:
    """Refuse entries whose student does not fit the teacher, by building those that are still to be
    trained without weights.

    Args:
        folders: the folder of the comparison.
        names: names of the entries to run.

    Raises:
        UserError: if there are such entries; the message has all of them.
    """
    teachers: dict[str, Planned] = {}
    built = set()
    refused: dict[str, list[str]] = {}
    for job in folders.jobs(names):
        if job.entry.name in built or is_over(job.folder):
            continue
        built.add(job.entry.name)
        recipe = folders.comparison.grid_recipe(job.entry, 1e-4)
        key = recipe.teacher.model_dump_json()
        if key not in teachers:
            teachers[key] = planned_teacher(recipe.teacher)
        try:
            with torch.device("meta"):
                METHODS[recipe.method.name].build(teachers[key], recipe)
        except UserError as error:
            refused.setdefault(str(error).rstrip("."), []).append(job.entry.name)
        except RuntimeError:  # a method that reads weights when it is built: its run will tell
            continue
    if refused:
        problems = "; ".join(by_entry(refused, folders.comparison))
        raise UserError(f"The comparison has mistakes: {problems}.")
