"""What a recipe makes, from the teacher's configuration alone: shapes, and memory for weights."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import torch
from transformers import PreTrainedModel

from lrc.cloning.projection import Projections
from lrc.cloning.shape.pruned_teacher import asked_shape, first_units, pruned_teacher, prunes
from lrc.model.families import check_supported
from lrc.model.loading import load_skeleton_of
from lrc.model.locate import locate
from lrc.model.precision import forward_dtype
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
    teacher = planned_teacher(recipe, model)
    asked_shape(teacher, recipe.student)
    config, source = student_config(teacher, recipe.student), cast(Teacher, teacher)
    if prunes(teacher, recipe.student):
        source = pruned_teacher(teacher, first_units(teacher, recipe.student))
    with torch.device("meta"):
        made = type(teacher.model)(config)
        projections = Projections(source, recipe.student)
    gains = len(list(source.layout.stream_norms())) * projections.hidden_size
    trained = gains + sum(value.numel() for value in projections.values.values())
    trained += sum(value.numel() for value in source.writers.values())
    student = sum(value.numel() for value in made.parameters())
    device = target_device(recipe)
    size = element_type(recipe.teacher.dtype, device).itemsize
    single = torch.float32.itemsize
    low = forward_dtype(recipe.train.precision, device) if device.type == "cuda" else torch.float32
    weights = {
        id(value): value for value in map(made.get_parameter, (w.name for w in projections.weights))
    }
    stored = single * student
    stored -= (single - low.itemsize) * sum(value.numel() for value in weights.values())
    projected = stored + single * student + single * (1 + 1 + ADAM) * trained
    released = single * (1 + 1 + ADAM) * student
    stages = [projected] if recipe.train.release_at > 0 else []
    stages += [released] if recipe.train.release_at < 1 else []
    model = teacher.model
    return TrainingSizes(
        model,
        made,
        trained,
        size * sum(value.numel() for value in model.parameters()),
        max(stages),
    )


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


def planned_teacher(recipe: Recipe, model: PreTrainedModel | None = None) -> Planned:
    """The teacher of a recipe of the method `lrc` on the meta device, from its configuration.

    Args:
        recipe: the recipe.
        model: the model, with or without weights; None: read from its files.

    Raises:
        UserError: as `sizes_of`.
    """
    if recipe.method.name != "lrc":
        raise UserError(
            f"The recipe's method is {recipe.method.name}, but only those of the method lrc are "
            "shown: give a model instead."
        )
    section = recipe.teacher
    if model is None:
        files = locate(section.model, section.revision, weights=False)
        model = load_skeleton_of(files, check=False)
    family = check_supported(model.config)
    model.requires_grad_(False).eval()
    return Planned(model, None, family, section.model)


def target_device(recipe: Recipe) -> torch.device:
    """The device that a recipe is for. With `auto` this machine has the word, unless the recipe
    asks for bfloat16."""
    name = recipe.train.device
    if name == "auto":
        low = recipe.train.precision == "bfloat16"
        name = "cuda" if low or torch.cuda.is_available() else "cpu"
    return torch.device(name)
