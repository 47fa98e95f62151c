"""The student: its configuration, and an instance of the teacher's class to hold its weights.

The student is an ordinary transformers model. Its projected weights are written into it before
every optimizer step (`lrc.cloning.projection`). The forward pass and the exported model are
therefore transformers' own and need none of our code.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lrc.model.pruned_shape import PrunedShape, check_config, pruned_config, shape_of_config
from lrc.model.shapes import attention_layers
from lrc.model.sizes import check_student_size
from lrc.model.teacher import Teacher
from lrc.recipe.sections import Keep, StudentSection
from lrc.system.errors import UserError

EXPERTS_MULTIPLE = 8
"""What the hidden size of a model with experts must be a multiple of: torch's grouped products need
rows of whole 16 bytes."""


def ties_projections(teacher: Teacher, student: StudentSection) -> bool:
    """Whether embedding and LM head share one projection (default: if the teacher ties them)."""
    if student.tie_projections is None:
        return bool(teacher.config.tie_word_embeddings)
    return student.tie_projections


def ties_weights(teacher: Teacher, student: StudentSection) -> bool:
    """Whether the student's LM head is its embedding.

    It is if both the teacher's weights and the projections are tied.
    """
    return bool(teacher.config.tie_word_embeddings) and ties_projections(teacher, student)


def student_config(teacher: Teacher, student: StudentSection) -> Any:
    """Return the teacher's configuration with the student's hidden size and an explicit head_dim.

    Raises:
        UserError: if the hidden size is odd, is not smaller than the teacher's, or the teacher's
            configuration class refuses it.
    """
    whole, own = shape_of_config(teacher.config), student_shape(teacher, student)
    heads = int(teacher.config.num_attention_heads) * own.kv_heads // whole.kv_heads
    narrower = replace(own, hidden=whole.hidden) != whole
    check_hidden_size(teacher, own.hidden, heads, teacher.hidden_size if narrower else None)
    config = derive_config(teacher, student)
    check_config(config)
    return config


def check_hidden_size(
    teacher: Teacher, hidden_size: int, heads: int | None = None, largest: int | None = None
) -> None:
    """Refuse a hidden size that gives no usable student of a teacher.

    Args:
        teacher: the teacher.
        hidden_size: the student's hidden size.
        heads: number of the student's attention heads; None means as many as the teacher's.
        largest: the largest allowed hidden size; None allows any below the teacher's.

    Raises:
        UserError: if `check_student_size` refuses it.
    """
    heads = heads or int(teacher.config.num_attention_heads)
    check_student_size(hidden_size, teacher.family, teacher.hidden_size, heads, largest)
    sizes = teacher.family.hidden_sizes(teacher.config)
    if sizes is not None and hidden_size not in sizes:
        below = [size for size in sizes if size <= (largest or teacher.hidden_size - 1)]
        nearest = min(below, key=lambda size: abs(size - hidden_size))
        raise UserError(
            f"student.hidden_size is {hidden_size}, but the width of this "
            f"{teacher.family.model_type} model's Mamba layers must be a multiple of it: the "
            f"nearest is {nearest}."
        )
    if teacher.layout.has_experts and hidden_size % EXPERTS_MULTIPLE:
        nearest = max(1, round(hidden_size / EXPERTS_MULTIPLE)) * EXPERTS_MULTIPLE
        raise UserError(
            f"student.hidden_size is {hidden_size}, but the products of experts need a multiple of "
            f"{EXPERTS_MULTIPLE}: the nearest is {nearest}."
        )


def derive_config(teacher: Teacher, student: StudentSection) -> Any:
    """Return the student's configuration without checking its hidden size."""
    shape = student_shape(teacher, student)
    return pruned_config(
        teacher, shape, kept_layers(teacher, student), ties_weights(teacher, student)
    )


def student_shape(teacher: Teacher, student: StudentSection) -> PrunedShape:
    """The student's shape; sizes that the recipe omits are the teacher's.

    A teacher that is already pruned keeps its own layers, heads and neurons.
    """
    whole = shape_of_config(teacher.config)
    if teacher.whole is not teacher:
        return replace(whole, hidden=student.hidden_size or whole.hidden)
    return PrunedShape(
        size_of(student.layers) or whole.layers,
        student.hidden_size or whole.hidden,
        size_of(student.kv_heads) or whole.kv_heads,
        size_of(student.intermediate_size) or whole.neurons,
        size_of(student.experts) or whole.experts,
    )


def size_of(asked: int | Keep | None) -> int | None:
    """How many units a recipe keeps; None: all."""
    return len(asked.keep) if isinstance(asked, Keep) else asked


def kept_layers(teacher: Teacher, student: StudentSection) -> list[int]:
    """The teacher's layers that a student keeps, as far as the recipe says. If it gives only a
    number, they are evenly spaced until a start chooses them; one of a hybrid has attention."""
    total, asked = teacher.num_layers, student.layers
    if asked is None or teacher.whole is not teacher:
        return list(range(total))
    if isinstance(asked, Keep):
        return asked.keep
    spaced = [index * total // asked for index in range(asked)]
    attention = attention_layers(teacher.config)
    if attention and asked > 1 and not set(attention) & set(spaced):
        spaced = sorted([*spaced[:-1], attention[-1]])
    return spaced


def empty_student(source: PreTrainedModel, config: Any) -> PreTrainedModel:
    """Create a model of the teacher's class with transformers' initial weights, for a student.

    Device, attention implementation and generation config are the teacher's. The element type is
    the teacher's too, but at least float32. The model is in evaluation mode and stays in it during
    training.

    Raises:
        UserError: if the configuration's own class refuses it.
    """
    check_config(config)
    model = type(source)(config)
    model = model.to(device=source.device, dtype=torch.promote_types(source.dtype, torch.float32))
    model.set_attn_implementation(source.config._attn_implementation)
    model.generation_config = copy.deepcopy(source.generation_config)
    # With it, torch leaves out the gradient of a token that texts may have: often pad is EOS.
    model.get_input_embeddings().padding_idx = None
    return model.eval()  # the student has no dropout, whatever the configuration says


def plain_view(model: PreTrainedModel) -> PreTrainedModel:
    """Create a plain model that shares only its weights with a model in training.

    It has no hooks, no gradients, no recomputation and no kernels of `train.kernels`. Training
    updates its weights too.
    """
    instead: dict[int, Any] = {id(buffer): buffer.detach() for buffer in model.buffers()}
    for value in model.parameters():
        instead[id(value)] = nn.Parameter(value.detach(), requires_grad=False)
    for module in model.modules():
        for name, hooks in vars(module).items():
            if name.startswith(("_forward_", "_backward_")):
                instead[id(hooks)] = type(hooks)()
    view = copy.deepcopy(model, instead)  # uses these as copies already made
    view.activation_checkpointing_disable()
    for module in view.modules():
        vars(module).pop("forward", None)  # liger-kernel's
    return view.eval()


def build_student(teacher: Teacher, student: StudentSection) -> PreTrainedModel:
    """Create the student as an instance of the teacher's class, on the teacher's device and dtype.

    Projected weights are left uninitialized, and residual norms have gain 1. Everything else
    (biases of q, k and v, norms inside the attention) is the teacher's, and frozen.
    """
    family, layout = teacher.family, teacher.layout
    model = empty_student(teacher.model, derive_config(teacher, student))
    projected = {f"{family.embedding}.weight", f"{family.head}.weight"}
    projected |= {parameter.name for parameter in layout.projected(model)}
    gains = {f"{norm}.weight" for norm in layout.stream_norms()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in gains:
                parameter.fill_(1.0 - family.gain_offset)
            elif name not in projected:
                parameter.copy_(teacher.parameter(name))
                parameter.requires_grad_(False)
        copy_buffers(teacher.model, model)
    return model


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Copy what is saved with a module but is not trained, such as the bias of a router, and what a
    model has given to its layers, such as the scales of Falcon-H1."""
    saved, own = target.state_dict(keep_vars=True), dict(target.named_buffers())
    for name, buffer in source.named_buffers():
        if name not in own:
            path, _, attribute = name.rpartition(".")
            target.get_submodule(path).register_buffer(attribute, buffer, persistent=False)
        elif name in saved:
            own[name].copy_(buffer)
