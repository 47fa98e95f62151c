"""The writer of a block whose output passes through an RMSNorm before it is added to the stream.

The teacher adds diag(g) u / rms(u) for the block's output u [d_T]. The student has a gain of its
own, s [d_S], and adds s * (u P) / rms(u P). With Q = P diag(s) this is (u Q) / rms(u Q diag(s)^-1),
so Q gives the direction and s only how the length of u is measured:

1. Q fits u Q / rms(u) to what the stream lacks, shrunk toward diag(g) B. This is least squares.
2. 1 / s^2 fits the mean square of u Q diag(s)^-1 to that of u, relative to it. This is least
   squares too, shrunk toward an s for which all channels of u P have the same mean square.
3. Q is fitted again with the length that the student measures, and so on. The fit with the least
   error on tokens that no solve sees is kept.

The basis B is rotated so that the matrices B^T diag(g)^-2 B of all norms are nearly diagonal
(`diagonal_basis`). If d_S = d_T, the student's channels then are the teacher's.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lrc.cloning.start.closed_form.least_squares import NOTHING, regress

ROUNDS = 3
"""Fits of Q."""

RIDGES = 1e-8, 1e-4, 1e-2, 1.0
"""Ridges that are tried in the fit of 1 / s^2, in units of the mean eigenvalue of its features'
second moment."""

SMALLEST_GAIN = 1e-2
"""Smallest gain to divide by, in units of the median."""

SMALLEST_SHARE = 1e-2
"""Smallest 1 / s^2, in units of what it is shrunk toward."""

WrittenRows = Callable[[bool], Iterable[tuple[Tensor, Tensor, Tensor]]]
"""Returns batches of the block's outputs u [tokens, d_T], of what the stream lacks [tokens, d_S],
and of weights [tokens, 1]: of the tokens that no solve sees if the argument is true, of the others
if not."""


def inverse_squares(gain: Tensor) -> Tensor:
    """1 / g^2 of a gain [d_T] in float64, bounded."""
    size = gain.double().abs()
    return size.clamp_min(SMALLEST_GAIN * float(size.median())).square().reciprocal()


def diagonal_basis(basis: Tensor, gains: Iterable[Tensor]) -> Tensor:
    """A basis B R [d_T, d_S] of the same space in which the mean of the B^T diag(g)^-2 B is
    diagonal.

    Args:
        basis: B [d_T, d_S], orthonormal columns.
        gains: the gains [d_T] of the teacher's norms after its blocks.
    """
    exact = basis.double()
    mean = torch.stack([share / share.mean() for share in map(inverse_squares, gains)]).mean(0)
    _, rotation = torch.linalg.eigh(exact.T @ (mean[:, None] * exact))
    return (exact @ rotation).to(basis.dtype).contiguous()


def writer_without_text(gain: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """P [d_T, d_S] and s [d_S] with Q = diag(g) B, and s as if the channels of u were independent
    and alike. If d_S = d_T, this is exact in a `diagonal_basis`.

    Args:
        gain: g [d_T].
        basis: B [d_T, d_S].
    """
    q = gain[:, None] * basis
    scale = q.norm(dim=0).clamp_min(NOTHING)
    return q / scale, scale


def writer_through_norm(
    rows: WrittenRows, rms: Callable[[Tensor], Tensor], gain: Tensor, basis: Tensor
) -> tuple[Tensor, Tensor]:
    """The projection P [d_T, d_S] of a writer and the student's gain s [d_S] of the norm after it.

    Args:
        rows: the tokens.
        rms: returns the root mean square [tokens, 1] of rows [tokens, d], as the norm computes it.
        gain: g [d_T].
        basis: B [d_T, d_S].
    """
    prior = gain.double()[:, None] * basis.double()
    best: tuple[float, Tensor, Tensor] | None = None
    student: Tensor | None = None  # P, whose rows the student measures
    for _ in range(ROUNDS):

        def measured(
            unseen: bool, student: Tensor | None = student
        ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for u, lacking, weight in rows(unseen):
                yield u / rms(u if student is None else u @ student), lacking, weight

        q = regress(measured(False), measured(True), prior)
        found = [_with_gain(q, shares, basis.dtype) for shares in _shares(rows, rms, q)]
        errors = [0.0] * len(found)
        for u, lacking, weight in rows(True):
            for i, (projection, scale) in enumerate(found):
                output = u @ projection
                wrong = scale * output / rms(output) - lacking
                errors[i] += float((wrong.square() * weight).sum())
        least = min(range(len(found)), key=errors.__getitem__)
        student, _ = found[least]
        if best is None or errors[least] < best[0]:
            best = errors[least], *found[least]
    assert best is not None
    return best[1], best[2]


def _with_gain(q: Tensor, shares: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """P and s from Q and 1 / (d_S s^2)."""
    scale = (len(shares) * shares).rsqrt()
    return (q / scale).to(dtype).contiguous(), scale.to(dtype)


def _shares(rows: WrittenRows, rms: Callable[[Tensor], Tensor], q: Tensor) -> Iterator[Tensor]:
    """1 / (d_S s^2) [d_S] with sum_j (u Q)_j^2 / (d_S s_j^2) close to rms(u)^2, in float64, for
    each of `RIDGES`."""
    width = q.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=q.device)
    total = torch.zeros(width, dtype=torch.float64, device=q.device)
    tokens = 0
    for u, _, _ in rows(False):
        features = ((u / rms(u)).double() @ q).square()
        gram += features.T @ features
        total += features.sum(0)
        tokens += len(features)
    uniform = torch.full_like(total, 1 / width)
    if not total.any():  # the block writes nothing
        yield uniform
        return
    unit = tokens / total.clamp_min(NOTHING)  # makes the mean of every feature 1
    gram = gram * unit[:, None] * unit / tokens
    lacking = 1 - gram @ uniform
    values, vectors = torch.linalg.eigh(gram)
    for ridge in RIDGES:
        raised = values.clamp_min(0) + ridge * values.mean()
        shares = uniform + vectors @ ((vectors.T @ lacking) / raised)
        shares = shares.clamp_min(SMALLEST_SHARE / width)
        yield shares / shares.sum() * unit
