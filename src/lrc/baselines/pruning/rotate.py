"""A plain model whose residual stream is the teacher's, rotated into a basis and cut."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrc.cloning.projection import project
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

    Args:
        student: a model of the teacher's class, with hidden size d_S; written in place.
        teacher: the teacher, hidden size d_T.
        basis: B [d_T, d_S], orthonormal columns.
    """
    basis = basis.double()
    final_gain = torch.ones_like(basis[0])
    if student.config.tie_word_embeddings:
        gain = teacher.gain(teacher.family.final_norm, torch.double)
        final_gain, turn = torch.linalg.eigh(basis.T @ (gain[:, None] * basis))
        basis = basis @ turn
    parameters = dict(student.named_parameters())
    written = set()
    for name, value in _rotated(teacher, basis, final_gain):
        if name in parameters:  # a tied head is not among them
            parameters[name].copy_(value)
            written.add(name)
    for name in parameters.keys() - written:
        parameters[name].copy_(teacher.model.get_parameter(name))


def _rotated(teacher: Teacher, basis: Tensor, final_gain: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that a rotation changes, with their names."""
    family, layout = teacher.family, teacher.layout
    yield f"{family.embedding}.weight", _weight(teacher, f"{family.embedding}.weight") @ basis
    head = f"{family.head}.weight"
    yield head, _weight(teacher, head) * teacher.gain(family.final_norm, torch.double) @ basis
    unit = (basis.shape[0] / basis.shape[1]) ** 0.5
    for norm in layout.stream_norms():
        gains = final_gain if norm == family.final_norm else torch.ones_like(final_gain)
        yield f"{norm}.weight", gains * unit - family.gain_offset
    for parameter in layout.projected(teacher.model):
        weight = _weight(teacher, parameter.name)
        if parameter.norm is not None:
            weight = weight * teacher.gain(parameter.norm, torch.double)
        yield parameter.name, project(weight, basis, parameter.axis)


def _weight(teacher: Teacher, name: str) -> Tensor:
    return teacher.model.get_parameter(name).double()
