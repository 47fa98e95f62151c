"""The simple start from data: every projection is the basis of the teacher's leading directions.

B [d_T, d_S] holds the leading principal directions of the teacher's normalized residual stream.
This follows SliceGPT (arXiv 2401.15024), but with one basis for all layers, since the clone has no
rotations between its blocks. With folded gains every reader is W_T diag(gain) c B, every writer is
B^T W_T (`writer_without_text` if a norm follows it), and the embedding is E_T B. Nothing
compensates for what is lost, unlike in `lrc.cloning.start.closed_form.solve`. c = sqrt(d_T / d_S),
since the student's RMS is a mean over d_S numbers that hold nearly the teacher's whole square sum.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lrc.cloning.projection import Projections, projection_key
from lrc.cloning.start.basis import StreamStatistics, principal_basis
from lrc.cloning.start.calibration import Calibration
from lrc.cloning.start.closed_form.normed_writer import diagonal_basis, writer_without_text
from lrc.cloning.start.start import Start
from lrc.model.teacher import Teacher
from lrc.recipe.sections import InitializeSection
from lrc.system.progress import Progress


def pca_start(
    projections: Projections,
    section: InitializeSection,
    ids: Tensor,
    progress: Progress | None,
    statistics: StreamStatistics | None = None,
) -> Start:
    """The start of a recipe (`STARTS`)."""
    shared_head = "head" not in projections.values
    return pca_projections(projections.teacher, ids, projections.hidden_size, shared_head, progress)


@torch.no_grad()
def pca_projections(
    teacher: Teacher,
    ids: Tensor,
    hidden_size: int,
    shared_head: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Start:
    """Every projection of a student, with gains folded, from one pass of the teacher.

    Arguments and errors are those of `lrc.cloning.start.closed_form.solve.solve_projections`. A
    head that shares the embedding's projection has no teacher gain folded in. Instead, the
    student's final gain is c times the diagonal of B^T diag(gain) B.
    """
    with Calibration(teacher, ids, hidden_size) as calibration:
        basis = principal_basis(calibration, progress)
        layout = teacher.layout
        after = {norm: calibration.gain(norm) for norm in layout.after_norms()}
        basis = diagonal_basis(basis, after.values()) if after else basis
    scale = (teacher.hidden_size / hidden_size) ** 0.5
    solved: dict[str, Tensor] = {}
    gains_after: dict[str, Tensor] = {}
    for site in layout.sites():
        branch, key = layout.branch(site), projection_key(site)
        if not layout.writes(site):
            solved[key] = basis if branch.norm is None else scale * basis
        elif branch.after is None:
            solved[key] = basis
        else:
            norm = f"{layout.layer(site.layer)}.{branch.after}"
            solved[key], gains_after[norm] = writer_without_text(after[norm], basis)
    ratio = calibration.embedding_ratio
    solved["embedding"] = ratio * basis
    if not shared_head:
        solved["head"] = scale * basis
        gains = torch.ones(hidden_size, dtype=basis.dtype)
    else:
        gain = calibration.gain(calibration.family.final_norm)
        gains = scale / ratio * (basis * gain[:, None] * basis).sum(0)
    return Start(solved, gains, calibration.forward_seconds, gains_after)
