"""An FFN's readers refined by gradients on what the FFN writes.

The closed form solves gate and up for the teacher's normalized stream, the best guess of it that is
linear in the student's. What counts is their product behind the activation function: here both are
moved by Adam so that the FFN's output comes nearer to the target of its writer,

    sum w |down(act(gate) * up) P_down - t|_F^2,   t = x_T(after) B - x_S(before),

w as in the closed form, in the metric of the Fisher information that the teacher's predictions hold
about the stream.

Both readers and the writer (which is solved anew afterwards) are moved in whitened coordinates,
P = A^-1/2 Q C^-1/2 with A the metric of the teacher's weight, W_T^T W_T, and C the second moment of
what is read: Adam's steps, as large in every coordinate, would else go mostly along the mean of
the stream. After every epoch the tokens that no solve sees judge; the best readers are kept, be
they the first.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lrc.cloning.projection import project
from lrc.cloning.start.calibration import Calibration, input_of
from lrc.cloning.start.closed_form.descent import descend
from lrc.cloning.start.closed_form.least_squares import second_moment
from lrc.cloning.start.streams import ActivationStore

LEARNING_RATE = 0.04
"""Of Adam, times (d_T d_S)^(-1/4), in whitened coordinates, where the singular values of Q are
about 1. Near the best of what was tried with 64 to 32 and with 576 to 288."""

STEP_TOKENS = 1024
"""Tokens of a step, in whole sequences."""

RIDGE = 1e-2
"""Added to the second moments, in units of their mean eigenvalue."""


@dataclass(frozen=True)
class Ffn:
    """The FFN of a layer, in teacher and student."""

    student: nn.Module
    """The student's; its readers' weights are not used."""
    inner: nn.Module
    """Its down projection."""
    names: Mapping[str, str]
    """Parameters of the readers in `student`, by linear map."""
    weights: Mapping[str, Tensor]
    """The teacher's readers with the gain of their norm folded in, [d_ffn, d_T], by linear map."""
    down: nn.Module
    """The teacher's down projection."""

    def readers(self, projections: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's readers [d_ffn, d_S] by their parameters, from projections [d_T, d_S] by
        linear map."""
        return {self.names[name]: self.weights[name] @ projections[name] for name in self.weights}

    def written(self, z: Tensor, readers: Mapping[str, Tensor]) -> Tensor:
        """What the teacher's down projection writes on the student's activations, [..., d_T].

        Args:
            z: the student's normalized stream, [..., d_S].
            readers: as `readers` gives them.
        """

        written: Tensor = self.down(self._neurons(z, readers))
        return written

    def output(self, z: Tensor, readers: Mapping[str, Tensor], projection: Tensor) -> Tensor:
        """What the student's own down projection writes, [..., d_S]: its weight is projected, which
        costs less than to project what the teacher's writes.

        Args:
            z: the student's normalized stream, [..., d_S].
            readers: as `readers` gives them.
            projection: that of down, [d_T, d_S].
        """
        own = {
            name: project(value, projection, writes=True)
            for name, value in self.down.named_parameters()
        }
        return functional.linear(self._neurons(z, readers), own["weight"], own.get("bias"))

    def _neurons(self, z: Tensor, readers: Mapping[str, Tensor]) -> Tensor:
        """What down takes in the student, [..., d_ffn]."""
        return input_of(self.inner, lambda: functional_call(self.student, dict(readers), (z,)))


@dataclass(frozen=True)
class Target:
    """What the student's residual stream is meant to be after an FFN."""

    stream: ActivationStore
    """The teacher's, [sequences, length, d_T]."""
    basis: Tensor
    """B [d_T, d_S]."""
    metric: Tensor
    """F [d_S, d_S] of the errors, up to a factor: the Fisher information that the teacher's
    predictions hold about them."""


def refine_ffn(
    calibration: Calibration,
    ffn: Ffn,
    stream: ActivationStore,
    wrote: ActivationStore,
    target: Target,
    start: Mapping[str, Tensor],
    epochs: int,
) -> dict[str, Tensor]:
    """The readers of an FFN, refined.

    Args:
        calibration: the tokens.
        ffn: the FFN.
        stream: the student's residual stream before it.
        wrote: what the teacher's down projection writes on it as it was solved.
        target: what the stream is meant to be after it.
        start: projections of gate, up and down, [d_T, d_S], as they were solved.
        epochs: passes over the tokens.

    Returns:
        The projections of gate and up, [d_T, d_S].
    """
    solved_on = calibration.solved_on

    def roots(moment: Tensor) -> tuple[Tensor, ...]:
        return tuple(root.to(calibration.dtype) for root in square_roots(moment))

    _, metric_root = roots(target.metric.double())

    def rows(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The student's normalized stream, the writer's target and the root of its weight."""
        student, teacher = stream[part], target.stream[part]
        root = calibration.weights(teacher, student).sqrt()
        return student / calibration.rms(student), teacher @ target.basis - student, root

    read: Tensor = torch.zeros(())
    written: Tensor = torch.zeros(())
    energy = 0.0
    with torch.no_grad():
        for part in calibration.batches(0, solved_on):
            z, wanted, root = rows(part)
            read = read + second_moment(z)
            written = written + second_moment(wrote[part] * root)
            energy += float((wanted * root @ metric_root).square().sum())

        whiten_read, color_read = roots(read)
        whiten_wrote, color_wrote = roots(written)
        left = {name: roots(second_moment(weight)) for name, weight in ffn.weights.items()}
        values = {name: left[name][1] @ start[name] @ color_read for name in left}
        values["down"] = color_wrote @ start["down"]
    for value in values.values():
        value.requires_grad_()

    def projections() -> dict[str, Tensor]:
        moved = {name: left[name][0] @ values[name] @ whiten_read for name in left}
        return moved | {"down": whiten_wrote @ values["down"]}

    def errors(part: slice, readers: Mapping[str, Tensor], down: Tensor) -> Tensor:
        """Weighted errors of the FFN's output in the metric, [..., d_S]."""
        z, wanted, root = rows(part)
        return ((ffn.output(z, readers, down) - wanted) * root) @ metric_root

    def differentiate(part: slice, _epoch: int) -> None:
        moved = projections()
        share = (part.stop - part.start) / solved_on
        wrong = errors(part, ffn.readers(moved), moved["down"])
        (wrong.square().sum() / (share * max(energy, 1e-30))).backward()

    def judge(moved: Mapping[str, Tensor]) -> float:
        readers = ffn.readers(moved)
        parts = calibration.batches(solved_on)
        return sum(float(errors(part, readers, moved["down"]).norm(dim=-1).sum()) for part in parts)

    rate = LEARNING_RATE * float(target.basis.numel()) ** -0.25
    best = descend(
        calibration,
        values.values(),
        rate,
        STEP_TOKENS,
        epochs,
        differentiate,
        projections,
        judge,
        start,
    )
    return {name: best[name] for name in ffn.weights}


def square_roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """M^-1/2 and M^1/2 of a second moment [d, d], scaled to a mean eigenvalue of 1 and raised by
    `RIDGE`."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(0)
    values = values / values.mean().clamp_min(1e-30) + RIDGE
    return (vectors * values.rsqrt()) @ vectors.T, (vectors * values.sqrt()) @ vectors.T
