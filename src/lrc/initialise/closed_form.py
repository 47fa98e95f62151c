"""A start far ahead of random projections, solved in closed form from a short calibration pass.

Notation: x_T [tokens, d_T] and x_S [tokens, d_S] are the residual streams of teacher and student,
h = x_T / rms(x_T) and z = x_S / rms(x_S) what the norms make of them before their gains. Gains are
folded here: a student's reader is W_T diag(gain) P [d_m, d_S], a writer P^T W_T [d_S, d_m].

1. Basis. B [d_T, d_S]: leading eigenvectors of the mean of E[h h^T] over all norms of the stream.
   The student's stream is meant to be x_T B.
2. Layer by layer, on the student's own stream as it was solved so far:
   readers  P = argmin sum |h - P z|^2 + ridge |P - c B|^2
   writers  P = argmin sum w |Z P - (x_T(after) B - x_S(before))|^2 + ridge |P - B|^2, Z being the
   teacher's o or down on the student's heads or FFN activations; each writer thus corrects the
   error gathered so far. w = 1 / rms(x_T), since massive activations must not rule.
3. Head. With its own projection it is one more reader. Tied, the student's basis is rotated and
   its final gain set (`lrc.initialise.head`).

Where d_S = d_T the student is the teacher. Memory: about 4 d_T + d_S numbers a calibration token.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from lrc.initialise.calibration import Calibration, input_of, principal_basis
from lrc.initialise.head import head_metric, tied_head
from lrc.initialise.least_squares import Rows, regress
from lrc.projection import projection_key
from lrc.teacher import Teacher

READER_RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
WRITER_RIDGES = (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""Ridges tried, in units of the features' mean square."""


@torch.no_grad()
def solve_projections(
    teacher: Teacher,
    ids: Tensor,
    hidden_size: int,
    shared_head: bool,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Solve every projection of a student, with gains folded.

    Args:
        teacher: the teacher, float32 or wider.
        ids: calibration tokens, int64 [sequences, length], at least two sequences.
        hidden_size: d_S.
        shared_head: whether embedding and LM head share one projection.
        progress: called with the layers done and their number.

    Returns:
        The projections [d_T, d_S] by their keys, and the weight of the final gain [d_S]; the gains
        inside the layers are 1.
    """
    calibration = Calibration(teacher, ids, hidden_size)
    basis, final = principal_basis(calibration)
    metric = head_metric(calibration, final)
    solver = _Solver(calibration, basis)
    solved = {"embedding": basis}
    for index, before, middle, after in calibration.teacher_streams():
        solved |= solver.layer(index, before, middle, after)
        if progress:
            progress(index + 1, teacher.num_layers)
    if not shared_head:
        solved["head"] = solver.reader(after)
        return solved, torch.ones(hidden_size, dtype=basis.dtype)
    rotation, gains = tied_head(calibration, basis, solver.stream, after, metric)
    return {key: value @ rotation for key, value in solved.items()}, gains


class _Solver:
    """Solves the layers in order; `stream` is the student's residual stream so far."""

    def __init__(self, calibration: Calibration, basis: Tensor) -> None:
        self.calibration = calibration
        self.basis = basis
        embedding = calibration.weight(calibration.family.embedding)
        self.stream = functional.embedding(calibration.ids, embedding @ basis)

    def layer(self, index: int, before: Tensor, middle: Tensor, after: Tensor) -> dict[str, Tensor]:
        """The seven projections of a layer, from the teacher's streams [sequences, length, d_T]."""
        calibration, family = self.calibration, self.calibration.family
        layer = calibration.student_layer(index)

        solved = dict.fromkeys(("q", "k", "v"), self.reader(before))
        for name, projection in solved.items():
            calibration.fill_reader(layer, (index, name), projection)
        o = layer.get_submodule(family.linears["o"])
        written = torch.empty_like(before)
        for part in calibration.batches():
            heads = input_of(o, layer, self.stream[part], **calibration.arguments[index])
            written[part] = calibration.written((index, "o"), heads)
        solved["o"] = self.writer(written, middle)

        solved |= dict.fromkeys(("gate", "up"), self.reader(middle))
        for name in ("gate", "up"):
            calibration.fill_reader(layer, (index, name), solved[name])
        down = layer.get_submodule(family.linears["down"])
        ffn = layer.get_submodule(family.linears["down"].rpartition(".")[0])
        norm = layer.get_submodule(family.ffn_norm)
        for part in calibration.batches():
            activations = input_of(down, ffn, norm(self.stream[part]))
            written[part] = calibration.written((index, "down"), activations)
        solved["down"] = self.writer(written, after)
        return {projection_key(index, name): value for name, value in solved.items()}

    def reader(self, teacher: Tensor) -> Tensor:
        """P [d_T, d_S] that gives the teacher's h from the student's z."""
        calibration = self.calibration

        def rows(start: int, stop: int | None) -> Iterator[Rows]:
            for part in calibration.batches(start, stop):
                z = calibration.normalise(self.stream[part])
                yield z, calibration.normalise(teacher[part]), None

        solved_on = calibration.solved_on
        across = along = 0.0
        for z, h, _ in rows(0, solved_on):
            across += float(((h @ self.basis) * z).sum())
            along += float(z.pow(2).sum())
        prior = self.basis.double().T * (across / along)
        solved = regress(rows(0, solved_on), rows(solved_on, None), prior, READER_RIDGES)
        return solved.T.to(teacher.dtype).contiguous()

    def writer(self, written: Tensor, teacher: Tensor) -> Tensor:
        """P [d_T, d_S] with written @ P nearest to teacher @ B - stream; then adds it to the
        stream."""
        calibration = self.calibration

        def rows(start: int, stop: int | None) -> Iterator[Rows]:
            for part in calibration.batches(start, stop):
                target = (teacher[part] @ self.basis - self.stream[part]).flatten(0, 1)
                weights = 1 / calibration.rms(teacher[part].flatten(0, 1))
                yield written[part].flatten(0, 1), target, weights

        solved_on = calibration.solved_on
        prior = self.basis.double()
        solved = regress(rows(0, solved_on), rows(solved_on, None), prior, WRITER_RIDGES)
        solved = solved.to(teacher.dtype)
        for part in calibration.batches():
            self.stream[part] += written[part] @ solved
        return solved
