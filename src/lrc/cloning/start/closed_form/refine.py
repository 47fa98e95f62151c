"""Refinement of an FFN's readers by gradients on the output of the FFN.

The closed form solves gate and up for the best linear estimate of the teacher's normalized stream
from the student's. What matters is their product after the activation function. Here Adam moves
both so that the FFN's output approaches the target of its writer,

    sum w |down(act(gate) * up) P_down - t|_F^2,   t = x_T(after) B - x_S(before),

with w as in the closed form, in the metric of the Fisher information that the teacher's predictions
hold about the stream.

Both readers and the writer (which is solved again afterwards) move in whitened coordinates. There
P = A^-1/2 Q C^-1/2, where A is the metric of the teacher's weight, W_T^T W_T, and C is the second
moment of the input. Otherwise Adam's steps, which are equally large in every coordinate, would go
mostly along the mean of the stream. After every epoch the readers are evaluated on the tokens that
no solve sees. The best readers are kept, possibly the initial ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.cloning.projection import project
from lrc.cloning.start.calibration import Block, Calibration
from lrc.cloning.start.closed_form.descent import descend
from lrc.cloning.start.closed_form.least_squares import second_moment
from lrc.cloning.start.streams import ActivationStore
from lrc.model.families import Branch

LEARNING_RATE = 0.04
"""Learning rate of Adam, times (d_T d_S)^(-1/4), in whitened coordinates, where the singular values
of Q are about 1. Close to the best rate tried with 64 to 32 and with 576 to 288."""

STEP_TOKENS = 1024
"""Tokens of a step, in whole sequences."""

AFTER = "after"
"""Name of the gain of a norm after a block among its projections."""

RIDGE = 1e-2
"""Added to the second moments, in units of their mean eigenvalue."""


class Ffn:
    """The FFN of a layer: the teacher's own module with the student's weights.

    Args:
        calibration: the calibration.
        index: index of the layer.
        branch: its FFN, with one writer and without experts.
        block: the FFN as the layer calls it.
    """

    def __init__(self, calibration: Calibration, index: int, branch: Branch, block: Block) -> None:
        (self.writer,) = branch.writers
        self.normalizes = branch.norm is not None
        """Whether a norm is before the FFN."""
        self.block = block
        paths = {
            name: str(path).removeprefix(f"{branch.block}.")
            for name, path in branch.linears.items()
        }
        self.names = {name: f"{paths[name]}.weight" for name in branch.readers}
        """Parameters of the readers in the block, by linear map."""
        self.weights = {
            name: calibration.folded_weight(index, branch, name) for name in branch.readers
        }
        """The teacher's readers with the gain of their norm folded in, [d_ffn, d_T], by linear
        map."""
        writer = paths[self.writer]
        self.writer_parameters = {
            f"{writer}.{name}": value
            for name, value in block.module.get_submodule(writer).named_parameters()
        }

    def readers(self, projections: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's readers [d_ffn, d_S] by their parameters, from projections [d_T, d_S] by
        linear map."""
        return {self.names[name]: self.weights[name] @ projections[name] for name in self.weights}

    def output(self, z: Tensor, readers: Mapping[str, Tensor], projection: Tensor) -> Tensor:
        """Output of the student's own writer, [..., d_S]. Its weight is projected, which costs less
        than projecting the output of the teacher's.

        Args:
            z: what the student's FFN reads, [..., d_S].
            readers: the student's readers, as returned by `Ffn.readers`.
            projection: the projection of the writer, [d_T, d_S].
        """
        own = {
            name: project(value, projection, axis=-2)
            for name, value in self.writer_parameters.items()
        }
        return self.block(z, {**readers, **own})


@dataclass(frozen=True)
class Target:
    """Target of the student's residual stream after a branch."""

    stream: ActivationStore
    """The teacher's stream, [sequences, length, d_T]."""
    basis: Tensor
    """B [d_T, d_S]."""
    metric: Tensor
    """F [d_S, d_S] of the errors, up to a factor: the Fisher information that the teacher's
    predictions hold about them."""
    residual_scale: float = 1.0
    """Factor of what the branch adds."""
    layer_scale: float = 1.0
    """Factor of the stream after that."""

    def lacking(
        self, calibration: Calibration, part: slice, student: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the branch should add to the student's stream [b, length, d_S] of some sequences,
        and the weights [b, length, 1] of errors in it."""
        teacher = self.stream[part]
        if self.layer_scale != 1:
            teacher = teacher / self.layer_scale
        return teacher @ self.basis - student, calibration.weights(teacher, student)


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
        wrote: the output of the teacher's writer on the student's solved FFN.
        target: the target of the stream after it.
        start: the FFN's solved projections, [d_T, d_S], by linear map, and the gain of a norm after
            it.
        epochs: passes over the tokens.

    Returns:
        The projections of the readers, [d_T, d_S], by linear map.
    """
    solved_on = calibration.solved_on

    def roots(moment: Tensor) -> tuple[Tensor, ...]:
        return tuple(root.to(calibration.dtype) for root in square_roots(moment))

    _, metric_root = roots(target.metric.double())

    def rows(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """What the student's FFN reads, the writer's target and the root of its weight."""
        student = stream[part]
        lacking, weights = target.lacking(calibration, part, student)
        read = student / calibration.rms(student) if ffn.normalizes else student
        return read, lacking, weights.sqrt()

    read: Tensor = torch.zeros(())
    written: Tensor = torch.zeros(())
    energy = 0.0
    with torch.no_grad():
        for part in calibration.batches(0, solved_on):
            z, wanted, root = rows(part)
            u = wrote[part] / calibration.rms(wrote[part]) if AFTER in start else wrote[part]
            read = read + second_moment(z)
            written = written + second_moment(u * root)
            energy += float((wanted * root @ metric_root).square().sum())

        whiten_read, color_read = roots(read)
        whiten_wrote, color_wrote = roots(written)
        left = {name: roots(second_moment(weight)) for name, weight in ffn.weights.items()}
        values = {name: left[name][1] @ start[name] @ color_read for name in left}
        values[ffn.writer] = color_wrote @ start[ffn.writer]
        if AFTER in start:
            values[AFTER] = start[AFTER].clone()
    for value in values.values():
        value.requires_grad_()

    def projections() -> dict[str, Tensor]:
        moved = {name: left[name][0] @ values[name] @ whiten_read for name in left}
        moved[ffn.writer] = whiten_wrote @ values[ffn.writer]
        return moved | ({AFTER: values[AFTER].clone()} if AFTER in values else {})

    def errors(part: slice, readers: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> Tensor:
        """Weighted errors of the FFN's output in the metric, [..., d_S]."""
        z, wanted, root = rows(part)
        output = ffn.output(z, readers, moved[ffn.writer])
        if AFTER in moved:
            output = moved[AFTER] * output / calibration.rms(output)
        return ((target.residual_scale * output - wanted) * root) @ metric_root

    def differentiate(part: slice, _epoch: int) -> None:
        moved = projections()
        share = (part.stop - part.start) / solved_on
        wrong = errors(part, ffn.readers(moved), moved)
        (wrong.square().sum() / (share * max(energy, 1e-30))).backward()

    def judge(moved: Mapping[str, Tensor]) -> float:
        readers = ffn.readers(moved)
        parts = calibration.batches(solved_on)
        return sum(float(errors(part, readers, moved).norm(dim=-1).sum()) for part in parts)

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
