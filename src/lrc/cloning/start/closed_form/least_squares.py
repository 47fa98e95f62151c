"""Regression on streamed second moments, with its strength measured on separate tokens."""

from collections.abc import Iterable

import torch
from torch import Tensor

Rows = tuple[Tensor, Tensor, Tensor | None]
"""Features [tokens, p], targets [tokens, q], and weights [tokens, 1] or None for 1."""

NOTHING = 1e-60
"""Replaces 0 as a divisor if all features are 0 (a layer whose writer is 0)."""

RIDGE = 1e-2
"""Added to the features' second moment, in units of their mean square."""


def second_moment(rows: Tensor) -> Tensor:
    """sum u^T u of rows [..., d], as [d, d] in float64."""
    flat = rows.flatten(0, -2)
    return (flat.T @ flat).double()


def moments(rows: Iterable[Rows]) -> tuple[Tensor, Tensor]:
    """sum w u^T u [p, p] and sum w u^T v [p, q] in float64, accumulated batch by batch."""
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
    fit: Iterable[Rows], held_out: Iterable[Rows], prior: Tensor, scale_prior: bool = False
) -> Tensor:
    """A regression M [p, q] of v on u whose strength is measured on separate rows.

    In a chain of solves, each corrects the one before. Such a chain overfits as boosting does,
    however many rows it has, and the rows that it reads fit better than other rows will. So `fit`
    gives only the directions of M - prior: the singular vectors in coordinates where the features
    are white. Each singular value is the one that explains most of the residual on `held_out` along
    its pair of vectors, between 0 and the value from `fit`. Benaych-Georges, Bouchaud and Potters
    (arXiv 1901.05543) derive from random matrices what such cleaning of singular values can
    achieve; here it is simply measured.

    Args:
        fit: rows for the directions.
        held_out: rows for the strength of each direction.
        prior: M if nothing is known, [p, q], float64.
        scale_prior: whether the prior's scale is measured on `held_out` too.

    Returns:
        M [p, q] in float64.
    """
    gram, cross = moments(fit)
    held_gram, held_cross = moments(held_out)
    if scale_prior:
        explained = (prior * (held_gram @ prior)).sum().clamp_min(NOTHING)
        prior = prior * ((prior * held_cross).sum() / explained)
    values, vectors = torch.linalg.eigh(gram)
    raised = values.clamp_min(0) + RIDGE * values.mean()
    white = vectors * raised.clamp_min(NOTHING).rsqrt()
    left, strength, right = torch.linalg.svd(white.T @ (cross - gram @ prior), full_matrices=False)
    features = white @ left
    along = ((features.T @ (held_cross - held_gram @ prior)) * right).sum(1)
    energy = ((features.T @ held_gram) * features.T).sum(1)
    measured = torch.where(energy > 0, along / energy, 0.0).clamp_min(0).minimum(strength)
    return prior + (features * measured) @ right
