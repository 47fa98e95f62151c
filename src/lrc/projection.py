"""The trainable projections P_m and how the student's weights come out of them.

For a teacher weight W_T in torch's [out, in] layout (paper section 3.1):

* q, k, v, gate, up, embedding and LM head read or span the residual stream: W_S = W_T P_m;
* o and down write to it: W_S = P_m^T W_T (and a bias b_T becomes P_m^T b_T).

Every P_m is [d_T, d_S]. With folded gains a reader's weight is W_T diag(g) P_m, g being the
teacher's RMSNorm gain that the reader sees; this reaches the same students as W_T P_m.

Cost: the weights are projected once an optimiser step. The student's parameters are leaves, so
the gradients of any number of micro-batches gather on them, and one backward pass through the
projections at the end of the step brings them to the P_m.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrc.families import LINEARS, READERS
from lrc.sections import StudentSection
from lrc.student import ties_projections
from lrc.teacher import Teacher


@dataclass(frozen=True)
class Site:
    """One projected weight: where it stands in teacher and student, and what projects it."""

    path: str
    """Module path, the same in teacher and student."""

    projection: str
    """Key of its projection: `embedding`, `head` or `layers.<i>.<linear map>`."""

    writes: bool = False
    """Whether it writes to the residual stream (projected on its output side)."""

    norm: str | None = None
    """Module path of the norm whose output it alone reads with its projection, if any."""

    folded: bool = False
    """Whether that norm's gain is multiplied into the weight before it is projected."""


def sites(teacher: Teacher, student: StudentSection) -> list[Site]:
    """All projected weights, embedding first.

    The LM head is left out where the student ties it to the embedding.
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


def project(weight: Tensor, projection: Tensor, writes: bool) -> Tensor:
    """The student's weight, differentiable in the projection.

    Args:
        weight: W_T; [out, d_T] for a reader, [d_T, in] (or a bias, [d_T]) for a writer.
        projection: P_m, [d_T, d_S].
        writes: whether the weight writes to the residual stream.

    Returns:
        W_T P_m [out, d_S], or P_m^T W_T [d_S, in] (or [d_S]).
    """
    weight = weight.to(projection.dtype)
    return projection.T @ weight if writes else weight @ projection


class Projections:
    """The projections of a student, and the writing of its weights.

    `values` maps keys to the P_m, each [d_T, d_S]; they start at zero, for `lrc.initialise` to
    fill. They are float32 at least, whatever the teacher's dtype.
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
        self._written: list[tuple[nn.Parameter, Tensor]] = []

    def gain(self, norm: str) -> Tensor:
        """The teacher's gain [d_T] of the norm at a module path."""
        weight = self.teacher.parameter(f"{norm}.weight")
        return weight + self.teacher.family.gain_offset

    def student_parameters(self) -> dict[str, Tensor]:
        """Every projected parameter of the student by name, differentiable in the projections."""
        parameters = {}
        for site in self.sites:
            projection: Tensor = self.values[site.projection]
            if site.folded and site.norm:
                projection = self.gain(site.norm).to(projection.dtype)[:, None] * projection
            module = self.teacher.model.get_submodule(site.path)
            for name, _ in module.named_parameters(recurse=False):
                if name == "weight" or site.writes:
                    weight = self.teacher.parameter(f"{site.path}.{name}")
                    parameters[f"{site.path}.{name}"] = project(weight, projection, site.writes)
        return parameters

    def write_into(self, student: PreTrainedModel) -> None:
        """Write the projected weights into the student, and keep the way back for `backward`."""
        self._written = []
        for name, value in self.student_parameters().items():
            parameter = student.get_parameter(name)
            parameter.data = value.detach()
            parameter.grad = None
            self._written.append((parameter, value))

    def backward(self) -> None:
        """Bring the gradients gathered on the student's weights to the projections."""
        pairs = [(value, p.grad) for p, value in self._written if p.grad is not None]
        self._written = []
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])
