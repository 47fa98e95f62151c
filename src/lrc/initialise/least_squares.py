"""Ridge regression on streamed second moments, with the ridge chosen on tokens of its own."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Rows = tuple[Tensor, Tensor, Tensor | None]
"""Features [tokens, p], targets [tokens, q], and weights [tokens, 1] or None for 1."""


def moments(rows: Iterable[Rows]) -> tuple[Tensor, Tensor]:
    """sum w u^T u [p, p] and sum w u^T v [p, q] in float64, added up a batch at a time."""
    gram: Tensor | None = None
    cross: Tensor | None = None
    for u, v, w in rows:
        weighted = (u if w is None else u * w).T
        gram = (weighted @ u).double() + (0 if gram is None else gram)
        cross = (weighted @ v).double() + (0 if cross is None else cross)
    assert gram is not None
    assert cross is not None
    return gram, cross


def regress(
    fit: Iterable[Rows], held_out: Iterable[Rows], prior: Tensor, ridges: Sequence[float]
) -> Tensor:
    """argmin over M [p, q] of sum w |u M - v|^2 + ridge m |M - prior|^2.

    m is the mean diagonal of the features' second moment. The ridge is the one of `ridges` with the
    least error on `held_out`: a chain of solves that each correct the one before overfits as
    boosting does, however many tokens it has. That error is sum sqrt(w) |u M - v|, not squared: one
    token with a massive activation, missed or made up, would choose every ridge by itself.

    Args:
        fit: rows that are solved on.
        held_out: rows that choose the ridge.
        prior: what M is drawn to, [p, q], float64.
        ridges: those tried.

    Returns:
        M [p, q] in float64.
    """
    gram, cross = moments(fit)
    values, vectors = torch.linalg.eigh(gram)
    rest = vectors.T @ (cross - gram @ prior)
    solved = [
        prior + vectors @ (rest / (values.clamp_min(0) + ridge * values.mean())[:, None])
        for ridge in ridges
    ]
    errors = torch.zeros(len(solved), dtype=gram.dtype, device=gram.device)
    for u, v, w in held_out:
        for i, found in enumerate(solved):
            distances = (u @ found.to(u.dtype) - v).norm(dim=-1, keepdim=True)
            errors[i] += (distances if w is None else distances * w.sqrt()).sum()
    return solved[int(errors.argmin())]
