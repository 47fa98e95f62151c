"""A start far better than random projections, solved in closed form from a short calibration pass.

Notation: x_T [tokens, d_T] and x_S [tokens, d_S] are the residual streams of teacher and student.
The outputs of the norms before their gains are h = x_T / rms(x_T) and z = x_S / rms(x_S). Gains are
folded here: a student's reader is W_T diag(gain) P [d_m, d_S], a writer is P^T W_T [d_S, d_m].

1. Basis. B [d_T, d_S], orthonormal, keeps what the teacher's predictions need of its stream
   (`lrc.cloning.start.basis`). The target for the student's stream is x_T B.
2. Layer by layer, on the student's own stream as solved so far:
   readers  fit P z to h, shrunk toward c B z
   writers  fit Z P to x_T(after) B - x_S(before), shrunk toward Z B, where Z is the output of the
            teacher's o or down on the student's heads or FFN activations; each writer thus
            corrects the error accumulated so far.
   The weight of a token is w = 1 / max(rms(x_T), |x_S| d_T^-1/2), so that massive activations do
   not dominate. Separate tokens measure how far to follow each fit
   (`closed_form.least_squares`).
   In the first half of the layers, gradients on the output of the FFN then refine gate and up
   (`closed_form.refine`), and down is solved again.
3. Head. A head with its own projection is one more reader. For a tied head, the student's basis is
   rotated and its final gain is set to approximate that reader. The logits are scaled
   (`closed_form.head`). Gradients on the predictions refine the second half of the layers and the
   head (`closed_form.predictions`). Then the logits are scaled again.

If d_S = d_T, the student is the teacher. The teacher runs layer by layer: over the first tokens for
the basis, and over all tokens for the solves, which need the basis from the first layer on. Streams
take 3 d_T + 2 d_S numbers per calibration token, in memory, or in temporary files beyond
`calibration.IN_MEMORY`.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrc.cloning.method import Progress
from lrc.cloning.projection import Projections, projection_key
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
from lrc.recipe.sections import InitializeSection

FFN_READERS = "gate", "up"

LENGTH = 128
"""Tokens of a calibration sequence, unless the text's sequences are shorter. The rest of a sequence
depends on its first token, to which many teachers give massive activations. A student that misses
some of the first tokens loses these sequences. With more first tokens it misses fewer."""

RESTART = 8
"""Tokens at the end of a calibration sequence that restart at position 0, for one more first
token."""


def closed_form_start(
    projections: Projections, section: InitializeSection, ids: Tensor, progress: Progress | None
) -> Start:
    """The start of a recipe (`STARTS`)."""
    shared_head = "head" not in projections.values
    return solve_projections(
        projections.teacher,
        ids,
        projections.hidden_size,
        shared_head,
        progress,
        refine_epochs=section.refine_epochs,
    )


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
        ids: calibration tokens, int64 [sequences, length], at least two sequences. Long ones are
            cut (`LENGTH`).
        hidden_size: d_S.
        shared_head: whether embedding and LM head share one projection.
        progress: function that gets the number of completed layers and the total.
        refine_epochs: passes over the tokens that refine each FFN of the first half of the layers,
            and as many for the second half and the head; 0 for no refinement.

    Raises:
        UserError: if the disk has no room for the streams.
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
    """Cut sequences [sequences, length] into sequences of `LENGTH` tokens and drop the remainder.
    Also return how many of the last tokens of each restart. Shorter sequences do not change."""
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
    """The student's head and its value.

    Args:
        basis: B [d_T, d_S].
        stream: the student's last residual stream.
        read: P [d_T, d_S] that maps the student's z to the teacher's final h.
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
        """Number of layers, from the first, whose FFNs are refined on their output."""
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
        written = teacher.before  # no longer needed
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
        """Fill a stream with the output of the teacher's down projection on the student's FFN."""
        readers = ffn.readers(projections)
        for part in self.calibration.batches():
            stream = self.stream[part]
            written[part] = ffn.written(stream / self.calibration.rms(stream), readers)

    def _add(self, written: ActivationStore, projection: Tensor) -> None:
        """Add the output of a solved writer to the student's stream."""
        for part in self.calibration.batches():
            self.stream[part] += written[part] @ projection

    def reader(self, teacher: ActivationStore) -> Tensor:
        """P [d_T, d_S] that maps the student's z to the teacher's h."""
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
        """P [d_T, d_S] that fits written @ P to teacher @ B - stream."""
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
