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
from torch import Tensor
from torch.nn import functional

from lrc.cloning.projection import Projections, projection_key
from lrc.cloning.start.basis import StreamStatistics, predictive_basis, stream_statistics
from lrc.cloning.start.calibration import Block, Calibration, TeacherLayer
from lrc.cloning.start.closed_form.head import (
    OwnHead,
    StudentHead,
    TiedHead,
    diagonal_gains,
    folded_head,
    head_metric,
    logit_scale,
    tied_head,
)
from lrc.cloning.start.closed_form.least_squares import Rows, regress
from lrc.cloning.start.closed_form.normed_writer import diagonal_basis, writer_through_norm
from lrc.cloning.start.closed_form.predictions import LastLayers
from lrc.cloning.start.closed_form.refine import AFTER, Ffn, Target, refine_ffn
from lrc.cloning.start.start import Start
from lrc.cloning.start.streams import ActivationStore
from lrc.model.families import Branch
from lrc.model.layout import LinearSite
from lrc.model.teacher import Teacher
from lrc.recipe.sections import InitializeSection
from lrc.system.progress import Progress

LENGTH = 128
"""Tokens of a calibration sequence, unless the text's sequences are shorter. The rest of a sequence
depends on its first token, to which many teachers give massive activations. A student that misses
some of the first tokens loses these sequences. With more first tokens it misses fewer."""

RESTART = 8
"""Tokens at the end of a calibration sequence that restart at position 0, for one more first
token."""


def closed_form_start(
    projections: Projections,
    section: InitializeSection,
    ids: Tensor,
    progress: Progress | None,
    statistics: StreamStatistics | None = None,
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
        statistics=statistics,
    )


@torch.no_grad()
def solve_projections(
    teacher: Teacher,
    ids: Tensor,
    hidden_size: int,
    shared_head: bool,
    progress: Callable[[int, int], None] | None = None,
    refine_epochs: int = 0,
    statistics: StreamStatistics | None = None,
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
        statistics: those of the teacher's stream over these tokens; None: collect them.

    Raises:
        UserError: if the disk has no room for the streams.
    """
    sequences, restart = cut_sequences(ids, teacher)
    with Calibration(teacher, sequences, hidden_size, restart) as calibration:
        gain = calibration.gain(teacher.family.final_norm) if shared_head else None
        statistics = statistics or stream_statistics(calibration)
        basis = predictive_basis(statistics, hidden_size, gain)
        if after_norms := teacher.layout.after_norms():
            basis = diagonal_basis(basis, map(calibration.gain, after_norms))
        metrics = statistics.fisher_after_layers(basis, teacher.num_layers)
        del statistics
        last = LastLayers(calibration) if refine_epochs else None
        solver = _Solver(calibration, basis, metrics, refine_epochs, last.first if last else 0)
        solved = {"embedding": basis * calibration.embedding_ratio}
        for layer in calibration.student_layers():
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
            value = torch.ones(hidden_size, dtype=basis.dtype)
        elif head.rotation is not None:
            solved = {key: projection @ head.rotation for key, projection in solved.items()}
        gains = {norm: solved.pop(norm) for norm in after_norms}
        return Start(solved, value, seconds, gains=gains)


def cut_sequences(ids: Tensor, teacher: Teacher) -> tuple[Tensor, int]:
    """Cut sequences [sequences, length] into sequences of `LENGTH` tokens and drop the remainder.
    Also return how many of the last tokens of each restart. Shorter sequences do not change."""
    if ids.shape[1] < LENGTH:
        return ids, 0
    whole = ids.numel() // LENGTH * LENGTH
    cut = ids.flatten()[:whole].view(-1, LENGTH)
    restart = RESTART if teacher.family.keeps_documents_apart else 0
    if teacher.first_token is not None:
        cut = cut.clone()
        cut[:, 0] = teacher.first_token
        if restart:
            cut[:, -restart] = teacher.first_token
    return cut, restart


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
    rotation = None
    if calibration.source.layout.after_norms():  # their gains fix the student's channels
        gains = diagonal_gains(calibration, basis, stream, read, metric)
    else:
        rotation, gains = tied_head(calibration, basis, stream, read, metric)
    scale = calibration.logit_scale * calibration.embedding_ratio
    turned = basis if rotation is None else basis @ rotation
    rows = calibration.weight(calibration.family.head) @ turned
    return TiedHead(rotation, rows * scale), gains / calibration.embedding_ratio


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
        scale = calibration.family.embedding_scale(calibration.teacher.config)
        embedding = calibration.weight(calibration.family.embedding) @ basis * scale
        for part in calibration.batches():
            self.stream[part] = functional.embedding(calibration.ids[part], embedding)

    def layer(self, teacher: TeacherLayer) -> dict[str, Tensor]:
        """The projections of a layer by their keys, and the gains of norms after blocks by path.

        The readers of a branch share their P. So the teacher's own block, fed with gain * (P z),
        is the student's block with the teacher's writer.
        """
        calibration, index = self.calibration, teacher.index
        prefix = calibration.source.layout.layer(index)
        solved: dict[str, Tensor] = {}
        for number, branch in enumerate(calibration.source.layout.branches[index]):
            before, after = teacher.streams[number : number + 2]
            last = after is teacher.after
            target = Target(
                after,
                self.basis,
                self.metrics[index],
                calibration.residual_scale,
                calibration.layer_scale(teacher.module) if last else 1.0,
            )
            read = self.reader(before, normalized=branch.norm is not None)
            block = calibration.block(teacher.module, index, branch)
            gain = calibration.gain(f"{prefix}.{branch.norm}") if branch.norm else 1.0
            written = before  # no longer needed
            for part in calibration.batches():
                written[part] = block(
                    gain * (calibration.block_input(self.stream[part], branch) @ read.T)
                )
            found = dict.fromkeys(branch.readers, read) | self._writers(
                index, branch, written, target
            )
            refinable = len(branch.writers) == 1 and not branch.has_experts
            if index < self.refined and last and refinable:
                found |= self._refined(index, branch, block, written, target, found)
            self._add(branch, written, found, target)
            if branch.after is not None:
                solved[f"{prefix}.{branch.after}"] = found.pop(AFTER)
            solved |= {projection_key(LinearSite(index, name)): p for name, p in found.items()}
        return solved

    def _refined(
        self,
        index: int,
        branch: Branch,
        block: Block,
        written: ActivationStore,
        target: Target,
        solved: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """The refined projections of an FFN, if any; `written` gets its new output."""
        calibration = self.calibration
        ffn = Ffn(calibration, index, branch, block)
        found = refine_ffn(
            calibration, ffn, self.stream, written, target, solved, self.refine_epochs
        )
        if all(found[name] is solved[name] for name in found):
            return {}  # no step was an improvement
        readers = ffn.readers(found)
        for part in calibration.batches():
            written[part] = block(calibration.block_input(self.stream[part], branch), readers)
        return found | self._writers(index, branch, written, target)

    def _writers(
        self, index: int, branch: Branch, written: ActivationStore, target: Target
    ) -> dict[str, Tensor]:
        """The projection of a branch's writers, by linear map, and the gain of the norm after them
        if there is one."""
        if branch.after is None:
            return dict.fromkeys(branch.writers, self.writer(written, target))
        calibration = self.calibration
        solved_on = calibration.solved_on

        def rows(unseen: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            span = (solved_on, None) if unseen else (0, solved_on)
            for part in calibration.batches(*span):
                lacking, weights = target.lacking(calibration, part, self.stream[part])
                values = written[part], lacking / target.residual_scale, weights
                yield tuple(value.flatten(0, 1) for value in values)  # type: ignore[misc]

        path = f"{calibration.source.layout.layer(index)}.{branch.after}"
        projection, gain = writer_through_norm(
            rows, calibration.rms, calibration.gain(path), self.basis
        )
        return dict.fromkeys(branch.writers, projection) | {AFTER: gain}

    def _add(
        self, branch: Branch, written: ActivationStore, solved: dict[str, Tensor], target: Target
    ) -> None:
        """Add the output of a solved block to the student's stream."""
        projection = solved[next(iter(branch.writers))]  # all writers have the same
        for part in self.calibration.batches():
            output = written[part] @ projection
            if branch.after is not None:
                output = solved[AFTER] * output / self.calibration.rms(output)
            added = self.stream[part] + target.residual_scale * output
            self.stream[part] = added * target.layer_scale

    def reader(self, teacher: ActivationStore, normalized: bool = True) -> Tensor:
        """P [d_T, d_S] that maps the student's z to the teacher's h, or, if not normalized, the
        student's stream to the teacher's."""
        calibration = self.calibration

        def rows(start: int, stop: int | None) -> Iterator[Rows]:
            for part in calibration.batches(start, stop):
                theirs, ours = teacher[part].flatten(0, 1), self.stream[part].flatten(0, 1)
                if normalized:
                    yield calibration.normalize(ours), calibration.normalize(theirs), None
                else:
                    yield ours, theirs, calibration.weights(theirs, ours).square()

        solved_on = calibration.solved_on
        prior = self.basis.double().T
        solved = regress(rows(0, solved_on), rows(solved_on, None), prior, scale_prior=True)
        return solved.T.to(teacher.dtype).contiguous()

    def writer(self, written: ActivationStore, target: Target) -> Tensor:
        """P [d_T, d_S] that fits scale * written @ P to what the student's stream lacks."""
        calibration, scale = self.calibration, target.residual_scale

        def rows(start: int, stop: int | None) -> Iterator[Rows]:
            for part in calibration.batches(start, stop):
                lacking, weights = target.lacking(calibration, part, self.stream[part])
                ours = scale * written[part]
                yield ours.flatten(0, 1), lacking.flatten(0, 1), weights.flatten(0, 1)

        solved_on = calibration.solved_on
        prior = self.basis.double()
        solved = regress(rows(0, solved_on), rows(solved_on, None), prior)
        return solved.to(written.dtype)
