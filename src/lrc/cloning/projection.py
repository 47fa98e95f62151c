"""The trainable projections P_m, and the student's weights computed from them.

For a teacher weight W_T in torch's [out, in] layout (paper section 3.1):

* q, k, v, gate, up, embedding and LM head read or span the residual stream: W_S = W_T P_m;
* o and down write to it: W_S = P_m^T W_T (and a bias b_T becomes P_m^T b_T).

Every P_m is [d_T, d_S]. With folded gains, a reader's weight is W_T diag(g) P_m, where g is the
gain of the teacher's RMSNorm before the reader. This reaches the same students as W_T P_m.

Cost: the weights are projected once per optimizer step. The student's parameters are leaves, so
they accumulate the gradients of any number of micro-batches. At the end of the step, these become
the gradients of the P_m in one pass: grad P = W_T^T grad W_S, or W_T grad W_S^T. Weights and
gradients keep their memory from step to step, because new allocations in every step would fragment
the heap.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrc.model.families import LINEARS, READERS
from lrc.model.student import ties_projections
from lrc.model.teacher import Teacher
from lrc.recipe.sections import StudentSection


@dataclass(frozen=True)
class Site:
    """One projected weight: its path in teacher and student, and its projection."""

    path: str
    """Module path, the same in teacher and student."""

    projection: str
    """Key of its projection: `embedding`, `head` or `layers.<i>.<linear map>`."""

    writes: bool = False
    """Whether it writes to the residual stream (and is projected on its output side)."""

    norm: str | None = None
    """Module path of the norm whose output it reads, if it does not share its projection."""

    folded: bool = False
    """Whether the weight is multiplied by that norm's gain before it is projected."""


def sites(teacher: Teacher, student: StudentSection) -> list[Site]:
    """All projected weights, embedding first.

    The LM head is omitted if the student ties it to the embedding.
    """
    family, fold = teacher.family, student.fold_gains
    found = [Site(family.embedding, "embedding")]
    for layer in range(teacher.num_layers):
        for name in LINEARS:
            path, key = family.linear(layer, name), projection_key(layer, name)
            if name in READERS:
                norm = family.norm_read_by(layer, name)
                found.append(Site(path, key, norm=norm, folded=fold))
            else:
                found.append(Site(path, key, writes=True))
    if not ties_projections(teacher, student):
        found.append(Site(family.head, "head", norm=family.final_norm, folded=fold))
    elif not teacher.config.tie_word_embeddings:
        found.append(Site(family.head, "embedding"))
    return found


def projection_key(layer: int, name: str) -> str:
    """Key of the projection of linear map `name` in layer `layer`."""
    return f"layers.{layer}.{name}"


def project(weight: Tensor, projection: Tensor, writes: bool, out: Tensor | None = None) -> Tensor:
    """Project a teacher weight to the student's weight.

    Args:
        weight: W_T; [out, d_T] for a reader, [d_T, in] (or a bias, [d_T]) for a writer.
        projection: P_m, [d_T, d_S].
        writes: whether the weight writes to the residual stream.
        out: the tensor to write to; None: a new one, differentiable with respect to the projection.

    Returns:
        W_T P_m [out, d_S], or P_m^T W_T [d_S, in] (or [d_S]).
    """
    weight = weight.to(projection.dtype)
    factors = (projection.T, weight) if writes else (weight, projection)
    return torch.matmul(*factors, out=out)


def projection_gradient(weight: Tensor, gradient: Tensor, writes: bool) -> Tensor:
    """The gradient of `project` with respect to the projection, [d_T, d_S].

    Args:
        weight: W_T, as in `project`.
        gradient: the gradient of the student's weight, of the same shape.
        writes: whether the weight writes to the residual stream.
    """
    weight = weight.to(gradient.dtype)
    if writes:
        return weight.view(len(weight), -1) @ gradient.view(len(gradient), -1).T
    return weight.T @ gradient


class Projections:
    """The projections of a student, which also write its weights.

    `values` maps keys to the P_m, each [d_T, d_S]. They are zero until `lrc.cloning.start` fills
    them. They are at least float32, whatever the teacher's dtype.
    """

    def __init__(self, teacher: Teacher, student: StudentSection) -> None:
        self.teacher = teacher
        self.hidden_size = student.hidden_size
        self.sites = sites(teacher, student)
        model = teacher.model
        dtype = torch.promote_types(model.dtype, torch.float32)
        self.values: dict[str, nn.Parameter] = {}
        for site in self.sites:
            if site.projection not in self.values:
                zero = torch.zeros(
                    teacher.hidden_size, student.hidden_size, dtype=dtype, device=model.device
                )
                self.values[site.projection] = nn.Parameter(zero)

    def write_into(self, student: PreTrainedModel) -> None:
        """Write the projected weights into the student's parameters."""
        with torch.no_grad(), self._full_precision():
            for site, name, weight in self._weights():
                projection: Tensor = self.values[site.projection]
                if site.folded and site.norm:
                    gain = self.teacher.gain(site.norm).to(projection.dtype)
                    projection = gain[:, None] * projection
                project(weight, projection, site.writes, out=student.get_parameter(name).data)

    def freeze(self, keys: Iterable[str]) -> None:
        """Freeze the projections of the given keys, and drop all others."""
        self.values = {key: self.values[key] for key in keys}
        for value in self.values.values():
            value.requires_grad_(False)
            value.grad = None

    def forget_gradients(self, student: PreTrainedModel) -> None:
        """Set the gradients of the student's projected weights to zero. Call it before the first
        backward pass of a step."""
        for _, name, _ in self._weights():
            parameter = student.get_parameter(name)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    def backward(self, student: PreTrainedModel) -> None:
        """Add the gradients of the projections, from those accumulated on the student's weights."""
        with torch.no_grad(), self._full_precision():
            for site, name, weight in self._weights():
                gradient = student.get_parameter(name).grad
                if gradient is None:
                    continue
                moved = projection_gradient(weight, gradient, site.writes)
                value = self.values[site.projection]
                if site.folded and site.norm:
                    moved *= self.teacher.gain(site.norm).to(moved.dtype)[:, None]
                value.grad = moved if value.grad is None else value.grad.add_(moved)

    def _full_precision(self) -> torch.autocast:
        """Disable any surrounding autocast for the products of the projections."""
        return torch.autocast(self.teacher.model.device.type, enabled=False)

    def _weights(self) -> Iterator[tuple[Site, str, Tensor]]:
        """Every projected parameter: its site, its name in the student, the teacher's tensor."""
        for site in self.sites:
            module = self.teacher.model.get_submodule(site.path)
            for name, _ in module.named_parameters(recurse=False):
                if name == "weight" or site.writes:
                    path = f"{site.path}.{name}"
                    yield site, path, self.teacher.parameter(path)
