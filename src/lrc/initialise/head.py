"""The LM head of the closed-form start: its metric, and the rotation of a tied student."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lrc.initialise.calibration import Calibration
from lrc.initialise.least_squares import moments
from lrc.initialise.streams import Stream

METRIC_TOKENS = 4096
"""Tokens whose predictions form the metric."""
METRIC_MIX = 0.05
"""Share of the covariance of the head's rows in the metric, for tokens that are never predicted."""
RIDGE = 1e-3
"""Ridge of the tied head, in units of the stream's mean square."""


def head_metric(calibration: Calibration, final: Stream) -> Tensor:
    """The second-order term of KL(teacher || student) in the final normalised state.

    K = E[H^T (diag p - p p^T) H] + mix Cov(H) with H = H_T diag(final gain), over the teacher's
    predictions p.

    Args:
        calibration: the calibration.
        final: the teacher's last residual stream, [sequences, length, d_T].

    Returns:
        K [d_T, d_T] in float64.
    """
    family = calibration.family
    head = calibration.weight(family.head) * calibration.gain(family.final_norm)
    rows = torch.cat(list(_spread_rows(calibration, final)))
    mass, outer = torch.zeros_like(head[:, 0]), torch.zeros_like(head.T @ head)
    for start in range(0, len(rows), 512):
        p = torch.softmax(rows[start : start + 512] @ head.T, -1)
        mass += p.sum(0)
        mean = p @ head
        outer += mean.T @ mean
    centred = head - head.mean(0)
    metric = ((head * mass[:, None]).T @ head - outer) / len(rows)
    return (metric + METRIC_MIX * centred.T @ centred / len(head)).double()


def _spread_rows(calibration: Calibration, final: Stream) -> Iterator[Tensor]:
    """Every n-th token's final normalised state, by batches, METRIC_TOKENS or more in all."""
    length = calibration.ids.shape[1]
    every = max(1, calibration.ids.numel() // METRIC_TOKENS)
    for part in calibration.batches():
        yield calibration.normalise(
            final[part].flatten(0, 1)[-part.start * length % every :: every]
        )


def tied_head(
    calibration: Calibration, basis: Tensor, stream: Stream, final: Stream, metric: Tensor
) -> tuple[Tensor, Tensor]:
    """The rotation R [d_S, d_S] of the student's basis and its final gain s [d_S].

    RMSNorm commutes with rotations, so the basis B of the student is free up to an orthogonal R.
    Its logits H_T B R diag(s) R^T z come nearest to the teacher's in the metric K where, with
    Q = diag(gain)^-1 B and S = R diag(s) R^T, E |h - Q S z|_K^2 is least over symmetric S:
    A S C + C S A = G + G^T with A = Q^T K Q, C = E[z z^T], G = Q^T K E[h z^T], solved in the basis
    M where M^T C M = 1 and M^T A M is diagonal. The ridge adds observations (z, c B z).

    Args:
        calibration: the calibration.
        basis: B [d_T, d_S].
        stream: the student's last residual stream, [sequences, length, d_S].
        final: the teacher's, [sequences, length, d_T].
        metric: K [d_T, d_T].
    """
    second, cross = moments(
        (calibration.normalise(stream[part]), calibration.normalise(final[part]), None)
        for part in calibration.batches(0, calibration.solved_on)
    )
    wide = basis.double()
    ridge = RIDGE * second.diagonal().mean()
    cross = cross.T + ridge * wide * ((wide * cross.T).sum() / second.trace())
    second = second + ridge * torch.eye(len(second), dtype=second.dtype, device=second.device)
    gain = calibration.gain(calibration.family.final_norm).double()
    q = torch.where(gain.abs() > 1e-6, 1 / gain, 0.0)[:, None] * wide
    a, g = q.T @ metric @ q, q.T @ metric @ cross
    values, vectors = torch.linalg.eigh(second)
    white = vectors * values.rsqrt()
    alpha, turn = torch.linalg.eigh(white.T @ a @ white)
    m = white @ turn
    inner = (m.T @ (g + g.T) @ m) / (alpha[:, None] + alpha[None, :])
    gains, rotation = torch.linalg.eigh(m @ inner @ m.T)
    return rotation.to(basis.dtype), gains.to(basis.dtype)
