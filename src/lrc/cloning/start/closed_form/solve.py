"""A start far ahead of random projections, solved in closed form from a short calibration pass.

Notation: x_T [tokens, d_T] and x_S [tokens, d_S] are the residual streams of teacher and student,
h = x_T / rms(x_T) and z = x_S / rms(x_S) what the norms make of them before their gains. Gains are
folded here: a student's reader is W_T diag(gain) P [d_m, d_S], a writer P^T W_T [d_S, d_m].

1. Basis. B [d_T, d_S], orthonormal, keeps what the teacher's predictions need of its stream
   (`lrc.cloning.start.basis`). The student's stream is meant to be x_T B.
2. Layer by layer, on the student's own stream as it was solved so far:
   readers  P z nearest to h, drawn to c B z
   writers  Z P nearest to x_T(after) B - x_S(before), drawn to Z B, Z being the teacher's o or down
   on the student's heads or FFN activations; each writer thus corrects the error gathered so far.
   Tokens weigh w = 1 / max(rms(x_T), |x_S| d_T^-1/2), since massive activations must not rule.
   How far the tokens are followed is measured on others (`closed_form.least_squares`).
   In the first half of the layers gate and up are then refined by gradients on what the FFN writes
   (`closed_form.refine`), and down is solved anew.
3. Head. With its own projection it is one more reader. Tied, the student's basis is rotated and
   its final gain set to come near that reader. The logits are scaled (`closed_form.head`), the
   second half of the layers and the head refined by gradients on the predictions
   (`closed_form.predictions`), and the logits scaled again.

Where d_S = d_T the student is the teacher. The teacher runs layer by layer: over the first tokens
for the basis, and over all for the solving, which needs the basis from the first layer on. Streams
take 3 d_T + 2 d_S numbers a calibration token, in memory, or in temporary files beyond
`calibration.IN_MEMORY`.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrc.cloning.projection import projection_key
from lrc.cloning.start.basis import predictive_basis, stream_statistics
from lrc.cloning.start.calibration import Calibration, TeacherLayer, input_of
from lrc.cloning.start.closed_form.head import (
    OwnHead,
    StudentHead,
    TiedHead,
    folded_head,
    head_metric,
    logit_scale,
    tied_head,
)
from lrc.cloning.start.closed_form.least_squares import Rows, regress
from lrc.cloning.start.closed_form.predictions import LastLayers
from lrc.cloning.start.closed_form.refine import Ffn, Target, refine_ffn
from lrc.cloning.start.start import Start
from lrc.cloning.start.streams import ActivationStore
from lrc.model.teacher import Teacher

FFN_READERS = "gate", "up"

LENGTH = 128
"""Tokens of a calibration sequence, where the text's are not shorter. What follows in a sequence
rests on its first token, to which many teachers give massive activations. A student that misses
some of the first tokens loses these sequences, and more of them make it miss fewer."""

RESTART = 8
"""Tokens at the end of a calibration sequence that begin anew, for one first token more."""


@torch.no_grad()
def solve_projections(
    teacher: Teacher,
    ids: Tensor,
    hidden_size: int,
    shared_head: bool,
    progress: Callable[[int, int], None] | None = None,
    refine_epochs: int = 0,
) -> Start:
    """Solve every projection of a student, with gains folded.

    Args:
        teacher: the teacher.
        ids: calibration tokens, int64 [sequences, length], at least two sequences. Long ones
            are cut (`LENGTH`).
        hidden_size: d_S.
        shared_head: whether embedding and LM head share one projection.
        progress: called with the layers done and their number.
        refine_epochs: passes over the tokens in which each FFN of the first half of the layers is
            refined, and as many for the second half and the head; 0 leaves all solved.

    Raises:
        UserError: the disk has no room for the streams.
    """
    sequences, restart = cut_sequences(ids)
    with Calibration(teacher, sequences, hidden_size, restart) as calibration:
        gain = calibration.gain(teacher.family.final_norm) if shared_head else None
        statistics = stream_statistics(calibration)
        basis = predictive_basis(statistics, hidden_size, gain)
        metrics = statistics.fisher_after_layers(basis)
        del statistics
        last = LastLayers(calibration) if refine_epochs else None
        solver = _Solver(calibration, basis, metrics, refine_epochs, last.first if last else 0)
        solved = {"embedding": basis}
        for layer in calibration.teacher_layers():
            if last and layer.index == last.first:
                last.begin(solver.stream)
            solved |= solver.layer(layer)
            if progress:
                progress(layer.index + 1, teacher.num_layers)
        seconds, after = calibration.forward_seconds, layer.after
        read = solver.reader(after)
        head, value = _solved_head(calibration, basis, solver.stream, read, after, shared_head)
        value = value * logit_scale(calibration, head, value, solver.stream, after)
        if last:
            refined = last.refine(solved, after, head, value, refine_epochs)
            value = refined.pop(head.key)
            solved |= refined
            last.write(solver.stream, solved, calibration.solved_on)
            value = value * logit_scale(calibration, head, value, solver.stream, after)
        if isinstance(head, OwnHead):
            solved[head.key] = value
            return Start(solved, torch.ones(hidden_size, dtype=basis.dtype), seconds)
        turned = {key: projection @ head.rotation for key, projection in solved.items()}
        return Start(turned, value, seconds)


def cut_sequences(ids: Tensor) -> tuple[Tensor, int]:
    """Sequences [sequences, length] cut into such of `LENGTH` tokens, what is left at the end being
    dropped, and how many of the last tokens of each begin anew; shorter ones stay as they are."""
    if ids.shape[1] < LENGTH:
        return ids, 0
    whole = ids.numel() // LENGTH * LENGTH
    return ids.flatten()[:whole].view(-1, LENGTH), RESTART


def _solved_head(
    calibration: Calibration,
    basis: Tensor,
    stream: ActivationStore,
    read: Tensor,
    after: ActivationStore,
    shared: bool,
) -> tuple[StudentHead, Tensor]:
    """The student's head and what it takes.

    Args:
        basis: B [d_T, d_S].
        stream: the student's last residual stream.
        read: P [d_T, d_S] that gives the teacher's final h from the student's z.
        after: the teacher's last residual stream.
        shared: whether the head has the embedding's projection.
    """
    if not shared:
        return OwnHead(folded_head(calibration)), read
    metric = head_metric(calibration, after)
    rotation, gains = tied_head(calibration, basis, stream, read, metric)
    rows = calibration.weight(calibration.family.head) @ (basis @ rotation)
    return TiedHead(rotation, rows), gains


class _Solver:
    """Solves the layers in order; `stream` is the student's residual stream so far."""

    def __init__(
        self,
        calibration: Calibration,
        basis: Tensor,
        metrics: list[Tensor],
        refine_epochs: int,
        refined: int,
    ) -> None:
        self.calibration = calibration
        self.metrics = metrics
        self.refine_epochs = refine_epochs
        self.refined = refined
        """Layers, from the first, whose FFNs are refined on what they write."""
        self.basis = basis
        self.stream = calibration.stream(calibration.hidden_size)
        embedding = calibration.weight(calibration.family.embedding) @ basis
        for part in calibration.batches():
            self.stream[part] = functional.embedding(calibration.ids[part], embedding)

    def layer(self, teacher: TeacherLayer) -> dict[str, Tensor]:
        """The seven projections of a layer."""
        calibration, family = self.calibration, self.calibration.family
        layer = calibration.student_layer(teacher.index, teacher.module)

        solved = dict.fromkeys(("q", "k", "v"), self.reader(teacher.before))
        for name, projection in solved.items():
            calibration.fill_reader(layer, teacher, name, projection)
        o = layer.get_submodule(family.linears["o"])
        their_o = teacher.module.get_submodule(family.linears["o"])
        written = teacher.before  # not needed any more
        for part in calibration.batches():
            arguments = calibration.arguments[teacher.index]
            written[part] = their_o(input_of(o, layer, self.stream[part], **arguments))
        solved["o"] = self.writer(written, teacher.middle)
        self._add(written, solved["o"])

        solved |= dict.fromkeys(FFN_READERS, self.reader(teacher.middle))
        ffn = self._ffn(layer, teacher)
        self._write_ffn(written, ffn, solved)
        solved["down"] = self.writer(written, teacher.after)
        if teacher.index < self.refined:
            target = Target(teacher.after, self.basis, self.metrics[teacher.index])
            solved |= refine_ffn(
                calibration, ffn, self.stream, written, target, solved, self.refine_epochs
            )
            self._write_ffn(written, ffn, solved)
            solved["down"] = self.writer(written, teacher.after)
        self._add(written, solved["down"])
        return {projection_key(teacher.index, name): value for name, value in solved.items()}

    def _ffn(self, layer: nn.Module, teacher: TeacherLayer) -> Ffn:
        """The FFN of a layer of the student and of the teacher."""
        family = self.calibration.family
        path = family.linears["down"].rpartition(".")[0]
        return Ffn(
            layer.get_submodule(path),
            layer.get_submodule(family.linears["down"]),
            {
                name: family.linears[name].removeprefix(f"{path}.") + ".weight"
                for name in FFN_READERS
            },
            {
                name: self.calibration.folded_reader(teacher.index, teacher.module, name)
                for name in FFN_READERS
            },
            teacher.module.get_submodule(family.linears["down"]),
        )

    def _write_ffn(
        self, written: ActivationStore, ffn: Ffn, projections: dict[str, Tensor]
    ) -> None:
        """Fill a stream with what the teacher's down projection writes on the student's FFN."""
        readers = ffn.readers(projections)
        for part in self.calibration.batches():
            stream = self.stream[part]
            written[part] = ffn.written(stream / self.calibration.rms(stream), readers)

    def _add(self, written: ActivationStore, projection: Tensor) -> None:
        """Add what a solved writer writes to the student's stream."""
        for part in self.calibration.batches():
            self.stream[part] += written[part] @ projection

    def reader(self, teacher: ActivationStore) -> Tensor:
        """P [d_T, d_S] that gives the teacher's h from the student's z."""
        calibration = self.calibration

        def rows(start: int, stop: int | None) -> Iterator[Rows]:
            for part in calibration.batches(start, stop):
                z = calibration.normalize(self.stream[part])
                yield z, calibration.normalize(teacher[part]), None

        solved_on = calibration.solved_on
        prior = self.basis.double().T
        solved = regress(rows(0, solved_on), rows(solved_on, None), prior, scale_prior=True)
        return solved.T.to(teacher.dtype).contiguous()

    def writer(self, written: ActivationStore, teacher: ActivationStore) -> Tensor:
        """P [d_T, d_S] with written @ P nearest to teacher @ B - stream."""
        calibration = self.calibration

        def rows(start: int, stop: int | None) -> Iterator[Rows]:
            for part in calibration.batches(start, stop):
                theirs, ours = teacher[part].flatten(0, 1), self.stream[part].flatten(0, 1)
                weights = calibration.weights(theirs, ours)
                yield written[part].flatten(0, 1), theirs @ self.basis - ours, weights

        solved_on = calibration.solved_on
        prior = self.basis.double()
        solved = regress(rows(0, solved_on), rows(solved_on, None), prior)
        return solved.to(teacher.dtype)
