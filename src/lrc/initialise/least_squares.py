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
    boosting does, however many tokens it has.

    Args:
        fit: rows that are solved on.
        held_out: rows that choose the ridge.
        prior: what M is drawn to, [p, q], float64.
        ridges: those tried.

    Returns:
        M [p, q] in float64.
    """
    gram, cross = moments(fit)
    held_gram, held_cross = moments(held_out)
    values, vectors = torch.linalg.eigh(gram)
    rest = vectors.T @ (cross - gram @ prior)
    held_rest = vectors.T @ (held_cross - held_gram @ prior)
    held_gram = vectors.T @ held_gram @ vectors

    def step(ridge: float) -> Tensor:
        return rest / (values.clamp_min(0) + ridge * values.mean())[:, None]

    def error(move: Tensor) -> float:
        return float(((held_gram @ move - 2 * held_rest) * move).sum())

    return prior + vectors @ min((step(ridge) for ridge in ridges), key=error)
