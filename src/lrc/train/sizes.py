"""The models of a recipe, from the teacher's configuration alone."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from lrc.cloning.projection import Projections
from lrc.cloning.shape.pruned_teacher import asked_shape, first_units, pruned_teacher, prunes
from lrc.model.families import check_supported
from lrc.model.loading import load_skeleton_of
from lrc.model.locate import locate
from lrc.model.student import student_config
from lrc.model.teacher import Teacher
from lrc.recipe import Recipe
from lrc.recipe.sections import TeacherSection
from lrc.system.errors import UserError


@dataclass(frozen=True)
class PlannedModels:
    """The models of a recipe, without weights."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    trained: int
    """Elements of the projections, solved writers and norm gains that are trained before the
    release."""


def planned_models(recipe: Recipe) -> PlannedModels:
    """Build both models of a recipe of the method `lrc` on the meta device.

    Args:
        recipe: the recipe.

    Raises:
        UserError: if it is a recipe of another method, the teacher's configuration is not found or
            its family is not supported, or the student's shape does not fit.
    """
    need_clone(recipe)
    teacher = planned_teacher(recipe.teacher)
    asked_shape(teacher, recipe.student)
    config = student_config(teacher, recipe.student)
    source: Teacher = teacher
    if prunes(teacher, recipe.student):
        source = pruned_teacher(teacher, first_units(teacher, recipe.student))
    with torch.device("meta"):
        student = type(teacher.model)(config)
        projections = Projections(source, recipe.student)
    trained = len(list(source.layout.stream_norms())) * projections.hidden_size
    trained += sum(value.numel() for value in projections.values.values())
    trained += sum(value.numel() for value in source.writers.values())
    return PlannedModels(teacher.model, student, trained)


@dataclass(frozen=True)
class Planned(Teacher):
    """A teacher without weights and tokenizer."""

    kept: set[str] = field(default_factory=set)
    """Parameters that this process would keep whole if the teacher were divided."""

    def keep(self, names: Iterable[str]) -> None:
        wanted = set(names)
        self.kept.clear()
        self.kept.update(wanted)

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    def parameter(self, name: str) -> torch.Tensor:
        return self.model.get_parameter(name)


def need_clone(recipe: Recipe) -> None:
    """Refuse a recipe of another method than `lrc`.

    Raises:
        UserError: if it is one.
    """
    if recipe.method.name != "lrc":
        raise UserError(
            f"The recipe's method is {recipe.method.name}, but only those of the method lrc are "
            "shown: give a model instead."
        )


def planned_teacher(section: TeacherSection) -> Planned:
    """The teacher of a recipe on the meta device, from its configuration.

    Raises:
        UserError: if the configuration is not found or its family is not supported.
    """
    files = locate(section.model, section.revision, "configuration")
    model = load_skeleton_of(files, check=False)
    if section.tie_head:
        model.config.tie_word_embeddings = True
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    family = check_supported(model.config)
    model.requires_grad_(False).eval()
    return Planned(model, None, family, section.model)


def target_device(recipe: Recipe) -> torch.device:
    """The device that a recipe is for: with `auto` CUDA, whether this machine has it or not."""
    name = recipe.train.device
    return torch.device("cuda" if name == "auto" else name)
