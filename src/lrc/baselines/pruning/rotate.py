"""A plain model whose residual stream is the teacher's, rotated into a basis and cut."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrc.cloning.projection import project
from lrc.cloning.start.closed_form.normed_writer import diagonal_basis, writer_without_text
from lrc.model.student import copy_buffers
from lrc.model.teacher import Teacher


@torch.no_grad()
def write_rotated(student: PreTrainedModel, teacher: Teacher, basis: Tensor) -> None:
    """Write the teacher's weights into a student, with the residual stream x_T replaced by x_T B.

    Norms become x / rms(x), and their gains are fused into the linear maps that read them. Then
    embedding and readers are multiplied by B, and writers by B^T. The norms' weights become
    sqrt(d_T / d_S), so that a cut stream is still divided by the root of its sum of squares over
    d_T, as in SliceGPT.

    A tied LM head cannot absorb a gain that the embedding must not have. But B R is as good a basis
    as B for any orthogonal R. With R from the eigenvectors of S = B^T diag(gain) B, the final
    norm's own gain diag(R^T S R) replaces it, exactly if d_S = d_T.

    Where norms follow the blocks, their gains fix the basis up to signs, and the writers before
    them follow `writer_without_text`. The final gain is then the diagonal of S.

    Args:
        student: a model of the teacher's class, with hidden size d_S; written in place.
        teacher: the teacher, hidden size d_T.
        basis: B [d_T, d_S], orthonormal columns.
    """
    basis = basis.double()
    final_gain = torch.ones_like(basis[0])
    after = [teacher.gain(norm, torch.double) for norm in teacher.layout.after_norms()]
    if after:
        basis = diagonal_basis(basis, after)
    if student.config.tie_word_embeddings:
        gain = teacher.gain(teacher.family.final_norm, torch.double)
        shared = basis.T @ (gain[:, None] * basis)
        if after:
            final_gain = shared.diagonal()
        else:
            final_gain, turn = torch.linalg.eigh(shared)
            basis = basis @ turn
    parameters = dict(student.named_parameters())
    written = set()
    for name, value in _rotated(teacher, student.config, basis, final_gain):
        if name in parameters:  # a tied head is not among them
            parameters[name].copy_(value)
            written.add(name)
    for name in parameters.keys() - written:
        parameters[name].copy_(teacher.model.get_parameter(name))
    copy_buffers(teacher.model, student)


def _rotated(
    teacher: Teacher, config: Any, basis: Tensor, final_gain: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that a rotation changes, with their names."""
    family, layout = teacher.family, teacher.layout
    scales = map(family.embedding_scale, (teacher.config, config))
    ratio = next(scales) / next(scales)
    final_gain = final_gain / ratio if config.tie_word_embeddings else final_gain
    embedding = f"{family.embedding}.weight"
    yield embedding, ratio * _weight(teacher, embedding) @ basis
    head = f"{family.head}.weight"
    yield head, _weight(teacher, head) * teacher.gain(family.final_norm, torch.double) @ basis
    unit = (basis.shape[0] / basis.shape[1]) ** 0.5
    gains = dict.fromkeys(layout.stream_norms(), unit * torch.ones_like(final_gain))
    gains[family.final_norm] = unit * final_gain
    for parameter in layout.projected(teacher.model):
        weight, projection = _weight(teacher, parameter.name), basis
        branch = layout.branch(parameter.site)
        if parameter.norm is not None:
            projection = teacher.gain(parameter.norm, torch.double)[:, None] * basis
        elif layout.writes(parameter.site) and branch.after is not None:
            norm = f"{layout.layer(parameter.site.layer)}.{branch.after}"
            gain = teacher.gain(norm, torch.double)
            projection, gains[norm] = writer_without_text(gain, basis)
        yield parameter.name, project(weight, projection, parameter.axis)
    for norm, value in gains.items():
        yield f"{norm}.weight", value - family.gain_offset


def _weight(teacher: Teacher, name: str) -> Tensor:
    return teacher.model.get_parameter(name).double()
