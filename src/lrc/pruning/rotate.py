"""A plain model whose residual stream is the teacher's, turned into a basis and cut."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrc.families import LINEARS, READERS
from lrc.teacher import Teacher


@torch.no_grad()
def write_rotated(student: PreTrainedModel, teacher: Teacher, basis: Tensor) -> None:
    """Give a student the teacher's weights with the residual stream x_T replaced by x_T B.

    Norms are turned into x / rms(x), their gains fused into the linear maps that read them; then
    embedding and readers are multiplied by B, writers by B^T. The norms' weights become
    sqrt(d_T / d_S), so that a cut stream is still divided by the root of its sum of squares over
    d_T, as SliceGPT does.

    A tied LM head can take no gain that the embedding must not have. But a basis B R is as good
    as B for any orthogonal R: with R from the eigenvectors of S = B^T diag(gain) B, the final
    norm's own gain diag(R^T S R) does it, exactly where d_S = d_T.

    Args:
        student: a model of the teacher's class, with hidden size d_S; written in place.
        teacher: the teacher, hidden size d_T.
        basis: B [d_T, d_S], orthonormal columns.
    """
    family, config = teacher.family, teacher.config
    basis = basis.double()
    unit = (basis.shape[0] / basis.shape[1]) ** 0.5

    def weight(path: str) -> Tensor:
        return teacher.model.get_submodule(path).get_parameter("weight").double()

    def gain(norm: str) -> Tensor:
        return weight(norm) + family.gain_offset

    final = gain(family.final_norm)
    final_gain = torch.ones_like(basis[0])
    if student.config.tie_word_embeddings:
        final_gain, turn = torch.linalg.eigh(basis.T @ (final[:, None] * basis))
        basis = basis @ turn

    found = {f"{family.embedding}.weight": weight(family.embedding) @ basis}
    found[f"{family.head}.weight"] = (weight(family.head) * final) @ basis
    for norm in family.stream_norms(config.num_hidden_layers):
        gains = final_gain if norm == family.final_norm else torch.ones_like(final_gain)
        found[f"{norm}.weight"] = gains * unit - family.gain_offset
    for layer in range(config.num_hidden_layers):
        for name in LINEARS:
            path = family.linear(layer, name)
            if name in READERS:
                value = (weight(path) * gain(family.norm_read_by(layer, name))) @ basis
            else:
                value = basis.T @ weight(path)
                bias = teacher.model.get_submodule(path).bias
                if bias is not None:
                    found[f"{path}.bias"] = bias.double() @ basis
            found[f"{path}.weight"] = value
    for name, parameter in student.named_parameters():
        parameter.copy_(found[name] if name in found else teacher.model.get_parameter(name))
