"""The shape that a baseline prunes its teacher to."""

import copy

from transformers import PreTrainedModel

from lrc.model.layout import layout_of
from lrc.model.pruned_shape import PrunedShape, by_layer, group_size, shape_of_config
from lrc.model.student import check_hidden_size
from lrc.model.teacher import Teacher
from lrc.recipe.method_sections import PrunedShapeSection
from lrc.recipe.sections import StudentSection
from lrc.system.errors import UserError


def teacher_shape(teacher: Teacher) -> PrunedShape:
    """The shape of a teacher.

    Raises:
        UserError: if it cannot be pruned by heads, neurons and channels.
    """
    if not can_be_pruned(teacher.model):
        raise UserError(
            f"{teacher.family.model_type} models have other layers than Llama's, so heads and FFN "
            "neurons cannot be pruned: use lrc, slicegpt or a method that starts from random "
            "weights."
        )
    return shape_of_config(teacher.config)


def can_be_pruned(model: PreTrainedModel) -> bool:
    """Whether all layers are Llama's attention and FFN, nothing else in them belongs to single
    heads (sinks), and no scale depends on the hidden size."""
    layout = layout_of(model)
    narrower = copy.copy(layout.config)
    narrower.hidden_size = layout.config.hidden_size // 2
    scale = layout.family.embedding_scale
    sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    return layout.is_llamas and not sinks and scale(narrower) == scale(layout.config)


def target_shape(
    teacher: Teacher, student: StudentSection, section: PrunedShapeSection
) -> PrunedShape:
    """The shape that a recipe asks for; sizes that it omits are the teacher's.

    Unlike LRC's student, a pruned student may keep the teacher's hidden size.

    Raises:
        UserError: if a size is larger than the teacher's or does not fit. The message lists all
            such sizes.
    """
    whole = teacher_shape(teacher)
    asked = PrunedShape(
        section.layers or whole.layers,
        student.hidden_size or whole.hidden,
        section.kv_heads or whole.kv_heads,
        section.intermediate_size or whole.neurons,
    )
    problems = [
        f"method.{name} is {ours}, but the teacher's is {theirs}: choose at most {theirs}"
        for name, ours, theirs in (
            ("layers", asked.layers, whole.layers),
            ("kv_heads", asked.kv_heads, whole.kv_heads),
            ("intermediate_size", asked.neurons, whole.neurons),
        )
        if ours > theirs
    ]
    kinds = {kind for values in by_layer(teacher.config).values() for kind in values}
    if asked.layers < whole.layers and len(kinds) > 1:
        problems.append(
            f"method.layers is {asked.layers}, but the teacher's layers are of {len(kinds)} kinds "
            f"({', '.join(sorted(map(str, kinds)))}), so all {whole.layers} have to stay"
        )
    try:
        heads = min(asked.kv_heads, whole.kv_heads) * group_size(teacher.config)
        check_hidden_size(teacher, asked.hidden, heads, teacher.hidden_size)
    except UserError as error:
        problems.append(str(error).removesuffix("."))
    if problems:
        raise UserError("; ".join(problems) + ".")
    return asked
