"""The student: its configuration, and an instance of the teacher's own class to hold its weights.

The student is an ordinary transformers model whose projected weights are written into it before
every optimizer step (`lrc.cloning.projection`). Its forward pass, and the model that is exported,
are therefore transformers' own, and nothing of ours is needed to run it.
"""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from lrc.model.families import LINEARS
from lrc.model.sizes import check_student_size
from lrc.model.teacher import Teacher
from lrc.recipe.sections import StudentSection


def ties_projections(teacher: Teacher, student: StudentSection) -> bool:
    """Whether embedding and LM head share one projection (default: as the teacher ties them)."""
    if student.tie_projections is None:
        return bool(teacher.config.tie_word_embeddings)
    return student.tie_projections


def ties_weights(teacher: Teacher, student: StudentSection) -> bool:
    """Whether the student's LM head is its embedding: where both the teacher's weights and the
    projections are tied."""
    return bool(teacher.config.tie_word_embeddings) and ties_projections(teacher, student)


def student_config(teacher: Teacher, student: StudentSection) -> Any:
    """The teacher's configuration with the student's hidden size and an explicit head_dim.

    Raises:
        UserError: the hidden size is odd, not smaller than the teacher's, or refused by the
            teacher's configuration class.
    """
    check_hidden_size(teacher, student.hidden_size)
    return derive_config(teacher, student)


def check_hidden_size(
    teacher: Teacher, hidden_size: int, heads: int | None = None, largest: int | None = None
) -> None:
    """Refuse a hidden size that gives no usable student of a teacher.

    Args:
        teacher: the teacher.
        hidden_size: the student's.
        heads: the student's attention heads; None: as many as the teacher's.
        largest: the largest hidden size; None: any that is smaller than the teacher's.

    Raises:
        UserError: as `check_student_size`.
    """
    heads = heads or int(teacher.config.num_attention_heads)
    check_student_size(hidden_size, teacher.family, teacher.hidden_size, heads, largest)


def derive_config(teacher: Teacher, student: StudentSection) -> Any:
    """The student's configuration, without checking the hidden size against the teacher's."""
    source = teacher.config
    config = copy.deepcopy(source)
    config.head_dim = head_dim(teacher)
    config.hidden_size = student.hidden_size
    config.tie_word_embeddings = ties_weights(teacher, student)
    forget_origin(config)
    return config


def forget_origin(config: Any) -> None:
    """Drop from a copied configuration what is true of the model that it was copied from only."""
    for left_over in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        if hasattr(config, left_over):
            delattr(config, left_over)


def head_dim(teacher: Teacher) -> int:
    """Width of an attention head, which teacher and student share."""
    rows = teacher.model.get_submodule(teacher.family.linear(0, "q")).weight.shape[0]
    return int(rows) // int(teacher.config.num_attention_heads)


def empty_student(source: PreTrainedModel, config: Any) -> PreTrainedModel:
    """A model of a teacher's class as transformers starts it, for a student's weights.

    Device, attention implementation and generation config are the teacher's; the element type is
    too, but float32 at least. It is in evaluation mode, and stays so in training.
    """
    model = type(source)(config)
    model = model.to(device=source.device, dtype=torch.promote_types(source.dtype, torch.float32))
    model.set_attn_implementation(source.config._attn_implementation)
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.eval()  # a dropout in the configuration is not the student's


def build_student(teacher: Teacher, student: StudentSection) -> PreTrainedModel:
    """An instance of the teacher's class in the student's shape, on the teacher's device and dtype.

    Weights that are projected are left uninitialized and residual norms are at gain 1; all else
    (biases of q, k and v, norms inside the attention) is the teacher's, and frozen.
    """
    family, source = teacher.family, teacher.model
    model = empty_student(source, derive_config(teacher, student))

    projected = {family.embedding, family.head}
    projected |= {family.linear(i, m) for i in range(teacher.num_layers) for m in LINEARS}
    norms = set(family.stream_norms(teacher.num_layers))
    with torch.no_grad():
        for path, module in model.named_modules():
            if path in norms:
                module.weight.fill_(1.0 - family.gain_offset)
                continue
            for name, parameter in module.named_parameters(recurse=False):
                theirs = f"{path}.{name}"
                if path in projected and parameter.shape != source.get_parameter(theirs).shape:
                    continue
                parameter.copy_(teacher.parameter(theirs))
                parameter.requires_grad_(False)
    return model
