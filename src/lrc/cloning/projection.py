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

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrc.model.layout import LinearSite
from lrc.model.precision import tf32_products, upcast_dtype
from lrc.model.student import ties_projections
from lrc.model.teacher import Teacher
from lrc.recipe.sections import StudentSection
from lrc.system.distributed import Owners, Wait


@dataclass(frozen=True)
class ProjectedWeight:
    """A parameter of the student that is projected from the teacher's."""

    name: str
    """Its name, the same in teacher and student."""

    projection: str
    """Key of its projection: `embedding`, `head` or `layers.<i>.<linear map>`."""

    axis: int = -1
    """The axis of the hidden size: -1 reads the residual stream, -2 writes to it."""

    norm: str | None = None
    """Module path of the norm whose output it reads, if it does not share its projection."""

    folded: bool = False
    """Whether the weight is multiplied by that norm's gain before it is projected."""


def projected_weights(teacher: Teacher, student: StudentSection) -> list[ProjectedWeight]:
    """All projected weights, embedding first.

    The LM head is omitted if the student ties it to the embedding.
    """
    family, fold = teacher.family, student.fold_gains
    embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"
    found = [ProjectedWeight(embedding, "embedding"), *layer_weights(teacher, fold)]
    if not ties_projections(teacher, student):
        found.append(ProjectedWeight(head, "head", norm=family.final_norm, folded=fold))
    elif not teacher.config.tie_word_embeddings:
        found.append(ProjectedWeight(head, "embedding"))
    return found


def layer_weights(teacher: Teacher, fold: bool, first: int = 0) -> list[ProjectedWeight]:
    """The projected weights of the decoder layers from the first given one on.

    Args:
        teacher: the teacher.
        fold: whether to fold the norms' gains into the readers.
        first: index of the first layer.
    """
    return [
        ProjectedWeight(p.name, projection_key(p.site), p.axis, p.norm, fold and p.norm is not None)
        for p in teacher.layout.projected(teacher.model)
        if p.site.layer >= first
    ]


def projection_key(site: LinearSite) -> str:
    """Key of the projection of a linear map."""
    return f"layers.{site.layer}.{site.name}"


def project(weight: Tensor, projection: Tensor, axis: int, out: Tensor | None = None) -> Tensor:
    """Project a teacher weight to the student's weight.

    Args:
        weight: W_T; [out, d_T] with axis -1, [d_T, in] or a bias [d_T] with axis -2. Stacked
            weights of experts have one more dimension in front.
        projection: P_m, [d_T, d_S].
        axis: the axis of the hidden size.
        out: the tensor to write to; None: a new one, differentiable with respect to the projection.

    Returns:
        W_T P_m [out, d_S], or P_m^T W_T [d_S, in] (or [d_S]), stacked as W_T.
    """
    weight = weight.to(projection.dtype)
    factors = (weight, projection) if axis == -1 else (projection.T, weight)
    return torch.matmul(*factors, out=out)


def projection_gradient(weight: Tensor, gradient: Tensor, axis: int) -> Tensor:
    """The gradient of `project` with respect to the projection, [d_T, d_S].

    Args:
        weight: W_T, as in `project`.
        gradient: the gradient of the student's weight, of the same shape.
        axis: the axis of the hidden size.
    """
    weight = weight.to(gradient.dtype)
    if axis == -1:
        return weight.flatten(0, -2).T @ gradient.flatten(0, -2)
    if weight.ndim == 3:
        weight, gradient = (value.transpose(0, 1).flatten(1) for value in (weight, gradient))
    return weight.view(len(weight), -1) @ gradient.view(len(gradient), -1).T


FindParameter = Callable[[str], nn.Parameter]
"""Returns a parameter of the student by its name."""


@torch.no_grad()
def write_weights(
    teacher: Teacher,
    weights: Iterable[ProjectedWeight],
    values: Mapping[str, Tensor],
    find: FindParameter,
) -> None:
    """Write projected weights into a student's parameters.

    Args:
        teacher: the teacher.
        weights: the weights to write.
        values: the projections, each [d_T, d_S], by their keys.
        find: finds the student's parameters.
    """
    with _full_precision(teacher):
        for weight in weights:
            projection = values[weight.projection].detach()
            if weight.folded and weight.norm:
                gain = teacher.gain(weight.norm, projection.dtype)
                projection = gain[:, None] * projection
            out = find(weight.name).data
            if out.dtype == projection.dtype:
                project(teacher.parameter(weight.name), projection, weight.axis, out)
            else:
                out.copy_(project(teacher.parameter(weight.name), projection, weight.axis))


@torch.no_grad()
def add_projection_gradients(
    teacher: Teacher,
    weights: Iterable[ProjectedWeight],
    values: Mapping[str, Tensor],
    find: FindParameter,
) -> None:
    """Add the gradients of projections, from those of the student's weights.

    Arguments are those of `write_weights`. Weights without a gradient are skipped.
    """
    with _full_precision(teacher):
        for weight in weights:
            gradient = find(weight.name).grad
            if gradient is None:
                continue
            found = projection_gradient(teacher.parameter(weight.name), gradient, weight.axis)
            value = values[weight.projection]
            if weight.folded and weight.norm:
                found *= teacher.gain(weight.norm, found.dtype)[:, None]
            value.grad = found if value.grad is None else value.grad.add_(found)


def _full_precision(teacher: Teacher) -> torch.autocast:
    """Disable any surrounding autocast for the products of the projections."""
    return torch.autocast(teacher.model.device.type, enabled=False)


class Projections:
    """The projections of a student, which also write its weights.

    `values` maps keys to the P_m, each [d_T, d_S]. They are zero until `lrc.cloning.start` fills
    them. They are at least float32, whatever the teacher's dtype.

    Args:
        teacher: the teacher.
        student: the student's shape and parametrization.
        tf32: whether CUDA may compute the products of a step in TF32.
    """

    def __init__(self, teacher: Teacher, student: StudentSection, tf32: bool = False) -> None:
        self.teacher, self.tf32 = teacher, tf32
        self.owners = Owners()
        """The process that owns each projection, by key."""
        self._waits: list[Wait] = []
        self.hidden_size = student.hidden_size or teacher.hidden_size
        self.weights = projected_weights(teacher, student)
        model = teacher.model
        self.dtype = dtype = torch.promote_types(model.dtype, torch.float32)
        self.values: dict[str, nn.Parameter] = {}
        for weight in self.weights:
            if weight.projection not in self.values:
                zero = torch.zeros(
                    teacher.hidden_size, self.hidden_size, dtype=dtype, device=model.device
                )
                self.values[weight.projection] = nn.Parameter(zero)

    def write_into(self, student: PreTrainedModel) -> None:
        """Write the projected weights into the student's parameters. Owners of projections compute
        them and send them to all other processes, where they are complete after `wait`."""
        with tf32_products(self.tf32):
            for weight in self.weights:
                if self.owners.has(weight.projection):
                    write_weights(self.teacher, [weight], self.values, student.get_parameter)
                owner = self.owners[weight.projection]
                value = student.get_parameter(weight.name).data
                self._waits.append(self.owners.world.send(value, owner))

    def wait(self) -> None:
        """Wait for what other processes send."""
        for wait in self._waits:
            wait()
        self._waits.clear()

    def store_as(self, student: PreTrainedModel, dtype: torch.dtype) -> None:
        """Convert the student's projected weights. Their gradients are accumulated in at least
        float32: the projections need no other copy of the weights."""
        for weight in self.weights:
            parameter = student.get_parameter(weight.name)
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.grad_dtype = upcast_dtype(parameter)

    def freeze(self, keys: Iterable[str]) -> None:
        """Freeze the projections of the given keys, and drop all others."""
        self.values = {key: self.values[key] for key in keys}
        for value in self.values.values():
            value.requires_grad_(False)
            value.grad = None

    def forget_gradients(self, student: PreTrainedModel) -> None:
        """Set the gradients of the student's projected weights to zero. Call it before the first
        backward pass of a step."""
        parameters = [student.get_parameter(weight.name) for weight in self.weights]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=upcast_dtype(parameter))
        torch._foreach_zero_([parameter.grad for parameter in parameters])

    def backward(self, student: PreTrainedModel) -> None:
        """Add the gradients of the projections that this process owns, from those accumulated on
        the student's weights."""
        with tf32_products(self.tf32):
            add_projection_gradients(
                self.teacher, self._owned(), self.values, student.get_parameter
            )
            self._add_writer_gradients(student)

    @torch.no_grad()
    def _add_writer_gradients(self, student: PreTrainedModel) -> None:
        """Add the gradients of a pruned teacher's writers W: those of P^T W."""
        with _full_precision(self.teacher):
            for weight in self._owned():
                writer = self.teacher.writers.get(weight.name)
                gradient = student.get_parameter(weight.name).grad
                if writer is not None and gradient is not None:
                    added = self.values[weight.projection] @ gradient.to(self.dtype)
                    writer.grad = added if writer.grad is None else writer.grad.add_(added)

    def send(self, keys: Iterable[str]) -> None:
        """Send some projections from their owners to all processes, where they are complete after
        `wait`."""
        for key in keys:
            self._waits.append(self.owners.world.send(self.values[key].data, self.owners[key]))

    def costs(self) -> dict[str, float]:
        """Elements of the teacher's weights that each projection multiplies, by key."""
        costs = dict.fromkeys(self.values, 0.0)
        for weight in self.weights:
            if weight.projection in costs:
                costs[weight.projection] += self.teacher.model.get_parameter(weight.name).numel()
        return costs

    def needed(self) -> set[str]:
        """Names of the teacher's parameters that this process multiplies in every step."""
        owned = self._owned()
        gains = {f"{weight.norm}.weight" for weight in owned if weight.norm and weight.folded}
        return gains | {weight.name for weight in owned}

    def _owned(self) -> list[ProjectedWeight]:
        return [weight for weight in self.weights if self.owners.has(weight.projection)]
