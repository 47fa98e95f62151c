"""The writer of a block whose output passes through an RMSNorm before it is added to the stream.

The teacher adds diag(g) u / rms(u) for the block's output u [d_T]. The student has a gain of its
own, s [d_S], and adds s * (u P) / rms(u P). With Q = P diag(s) this is (u Q) / rms(u Q diag(s)^-1),
so Q gives the direction and s only how the length of u is measured:

1. Q fits u Q / rms(u) to what the stream lacks, shrunk toward diag(g) B. This is least squares.
2. 1 / s^2 fits the mean square of u Q diag(s)^-1 to that of u. This is least squares too, shrunk
   toward the diagonal of B^T diag(g)^-2 B d_S / d_T, which is exact if that matrix is diagonal and
   u diag(g) is in the span of B.
3. Q is fitted again with the length that the student measures, and so on. The fit with the least
   error on tokens that no solve sees is kept.

The basis B is rotated so that the matrices B^T diag(g)^-2 B of all norms are nearly diagonal
(`diagonal_basis`). If d_S = d_T, the student's channels then are the teacher's.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lrc.cloning.start.closed_form.least_squares import regress

ROUNDS = 3
"""Fits of Q."""

RIDGE = 1e-3
"""Ridge of the fit of 1 / s^2, in units of its features' mean square."""

SMALLEST_GAIN = 1e-2
"""Least gain to divide by, in units of the median."""

SMALLEST_SHARE = 1e-2
"""Least 1 / s^2, in units of what it is shrunk toward."""

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
    wide = basis.double()
    mean = torch.stack([share / share.mean() for share in map(inverse_squares, gains)]).mean(0)
    _, rotation = torch.linalg.eigh(wide.T @ (mean[:, None] * wide))
    return (wide @ rotation).to(basis.dtype).contiguous()


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
    shares = (basis.double().square() * inverse_squares(gain)[:, None]).sum(0) / len(basis)
    best: tuple[float, Tensor, Tensor] | None = None
    student: Tensor | None = None  # P, whose rows the student measures
    for _ in range(ROUNDS):

        def measured(
            unseen: bool, student: Tensor | None = student
        ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for u, lacking, weight in rows(unseen):
                length = rms(u if student is None else u @ student)
                yield u / length, lacking, weight

        q = regress(measured(False), measured(True), prior)
        share = _shares(rows, rms, q, shares)
        scale = (len(share) * share).rsqrt()  # s
        student = (q / scale).to(basis.dtype).contiguous()
        found = scale.to(basis.dtype)
        error = sum(
            float(((found * (u @ student) / rms(u @ student) - lacking).square() * weight).sum())
            for u, lacking, weight in rows(True)
        )
        if best is None or error < best[0]:
            best = error, student, found
    assert best is not None
    return best[1], best[2]


def _shares(rows: WrittenRows, rms: Callable[[Tensor], Tensor], q: Tensor, prior: Tensor) -> Tensor:
    """1 / (d_S s^2) [d_S] with sum_j (u Q)_j^2 / (d_S s_j^2) closest to rms(u)^2, float64."""
    gram = torch.zeros(len(prior), len(prior), dtype=torch.float64, device=prior.device)
    cross = torch.zeros_like(prior)
    q = q.to(torch.float64)
    for u, _, _ in rows(False):
        features = ((u / rms(u)).double() @ q).square()
        gram += features.T @ features
        cross += features.sum(0)
    gram = gram * prior[:, None] * prior  # in units of the prior
    lacking = cross * prior - gram.sum(1)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype).to(gram)
    change = torch.linalg.solve(gram + ridge, lacking)
    return prior * (1 + change).clamp_min(SMALLEST_SHARE)
