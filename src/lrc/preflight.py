"""Checks of a run that take a second, before torch is imported or a folder is created."""

from collections.abc import Sequence
from pathlib import Path

from lrc.data.shards import open_shards
from lrc.data.sources import source_files
from lrc.model.families import family_of
from lrc.model.locate import locate_locally
from lrc.model.settings import read_config
from lrc.model.sizes import check_student_size
from lrc.recipe import Recipe
from lrc.system.errors import UserError
from lrc.system.installed import is_installed


def check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe with a missing teacher, text or tracker, or unsuitable settings.

    Raises:
        UserError: if there is a mistake; the message names the first one.
    """
    files = locate_locally(recipe.teacher.model)
    if files is not None and files.gguf is None:
        config = read_config(files)
        student = recipe.student
        if recipe.method.name == "lrc" and student.kv_heads is None:
            check_student_size(
                student.hidden_size or config["hidden_size"],
                family_of(config["model_type"]),
                config["hidden_size"],
                config["num_attention_heads"],
                config["hidden_size"] if student != student.hidden_size_alone() else None,
            )
    if recipe.data.document_mask and recipe.teacher.attention == "flash_attention_2":
        raise UserError(
            "With teacher.attention: flash_attention_2, the documents of a sequence would see each "
            "other: set it to auto, or leave data.document_mask off."
        )
    source_files(recipe.data.text)
    source_files(recipe.data.held_out, held_out=True)
    for sources in recipe.data.also_held_out.values():
        source_files(sources, held_out=True)
    for folder in recipe.data.shards:
        open_shards(Path(folder).expanduser())
    check_installed(recipe.train.report_to)


def need_whole_teacher(recipe: Recipe) -> None:
    """Refuse to train with a teacher whose layers stay on disk.

    Raises:
        UserError: if the recipe asks for that.
    """
    if recipe.teacher.load == "layers":
        raise UserError(
            "teacher.load: layers is for `lrc compress`, but training needs the whole teacher in "
            "memory: set teacher.load to full (for a started run, in recipe.yaml in its folder)."
        )


def check_installed(names: Sequence[str]) -> None:
    """Refuse trackers whose library is missing.

    Raises:
        UserError: if one is not installed.
    """
    for name in names:
        if not is_installed(name):
            raise UserError(
                f"train.report_to names {name}, which is not installed: run "
                f"`pip install 'low-rank-clone[{name}]'`, or leave it out."
            )
