"""The shape that a teacher is pruned to."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from lrc.model.layout import layout_of
from lrc.model.shapes import head_dim_of
from lrc.model.student import check_hidden_size, forget_origin
from lrc.model.teacher import Teacher
from lrc.recipe.method_sections import PrunedShapeSection
from lrc.recipe.sections import StudentSection
from lrc.system.errors import UserError


@dataclass(frozen=True)
class PrunedShape:
    """The parts of a decoder's shape that pruning changes. Query heads are removed with their
    key/value head, and head_dim never changes."""

    layers: int
    hidden: int
    kv_heads: int
    neurons: int
    """Width of the FFN."""


def shape_of_config(config: Any) -> PrunedShape:
    """The shape of a model, from its configuration."""
    return PrunedShape(
        int(config.num_hidden_layers),
        int(config.hidden_size),
        int(config.num_key_value_heads),
        int(config.intermediate_size),
    )


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


def by_layer(config: Any) -> dict[str, list[Any]]:
    """The settings of a configuration that are lists with one value per layer."""
    names = ("layer_types", "no_rope_layers")
    return {name: values for name in names if (values := getattr(config, name, None))}


def group_size(config: Any) -> int:
    """Query heads that share a key/value head."""
    return int(config.num_attention_heads) // int(config.num_key_value_heads)


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
        student.hidden_size,
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


def pruned_config(
    model: PreTrainedModel | Teacher,
    shape: PrunedShape,
    layers: Sequence[int] | None = None,
    tied: bool | None = None,
) -> Any:
    """The configuration of a pruned model: the original one in a new shape, with an explicit
    head_dim.

    Args:
        model: the model to prune.
        shape: the shape to prune to.
        layers: indices of the kept layers; None for the first ones, which is equivalent if all
            layers are of one kind.
        tied: whether the LM head is the embedding; None for the model's own setting.
    """
    source = model.config
    config = copy.deepcopy(source)
    config.head_dim = head_dim_of(source)
    kept = range(shape.layers) if layers is None else layers
    for name, values in by_layer(source).items():
        setattr(config, name, [values[layer] for layer in kept])
    config.num_hidden_layers = shape.layers
    config.num_attention_heads = shape.kv_heads * group_size(source)
    config.num_key_value_heads = shape.kv_heads
    config.hidden_size = shape.hidden
    config.intermediate_size = shape.neurons
    config.tie_word_embeddings = source.tie_word_embeddings if tied is None else tied
    forget_origin(config)
    return config
