"""What a recipe makes, from the teacher's configuration alone: shapes, and memory for weights."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lrc.cloning.projection import Projections
from lrc.model.families import check_supported
from lrc.model.loading import load_skeleton_of
from lrc.model.locate import locate
from lrc.model.student import student_config
from lrc.model.teacher import Teacher, element_type
from lrc.recipe import Recipe
from lrc.system.errors import UserError

ADAM = 2
"""Values that AdamW keeps for each trained one."""


@dataclass(frozen=True)
class TrainingSizes:
    """The models of a recipe, without weights, and the bytes that a run holds all the time.

    Activations, which depend on the micro-batch, come on top (docs/cost.md).
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    projections: int
    """Elements of the projections and norm gains that are trained before the release."""
    teacher_bytes: int
    training_bytes: int
    """Student, trained values, gradients and AdamW's, in the larger of the two stages."""


def sizes_of(recipe: Recipe, model: PreTrainedModel | None = None) -> TrainingSizes:
    """Build both models of a recipe of the method `lrc` on the meta device.

    Args:
        recipe: the recipe.
        model: its teacher, with or without weights; None: read from its files.

    Raises:
        UserError: if it is a recipe of another method, the teacher's configuration is not found or
            its family is not supported, or the student's hidden size does not fit.
    """
    if recipe.method.name != "lrc":
        raise UserError(
            f"The recipe's method is {recipe.method.name}, but only those of the method lrc are "
            "shown: give a model instead."
        )
    section = recipe.teacher
    if model is None:
        model = load_skeleton_of(
            locate(section.model, section.revision, weights=False), check=False
        )
    family = check_supported(model.config)
    # The shape does not depend on the tokenizer.
    teacher = Teacher(model, None, family, section.model)
    config = student_config(teacher, recipe.student)
    with torch.device("meta"):
        made = type(model)(config)
        projections = Projections(teacher, recipe.student)
    gains = len(list(teacher.layout.stream_norms())) * projections.hidden_size
    trained = gains + sum(value.numel() for value in projections.values.values())
    student = sum(value.numel() for value in made.parameters())
    device = "cuda" if recipe.train.precision == "bfloat16" else "cpu"
    size = element_type(section.dtype, device).itemsize
    single = torch.float32.itemsize
    projected = single * ((1 + 1) * student + (1 + 1 + ADAM) * trained)
    released = single * (1 + 1 + ADAM) * student
    stages = [projected] if recipe.train.release_at > 0 else []
    stages += [released] if recipe.train.release_at < 1 else []
    return TrainingSizes(
        model,
        made,
        trained,
        size * sum(value.numel() for value in model.parameters()),
        max(stages),
    )
