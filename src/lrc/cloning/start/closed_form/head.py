"""The LM head of the closed-form start: a tied student's rotation, and the scale of the logits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrc.cloning.start.calibration import Calibration
from lrc.cloning.start.closed_form.least_squares import second_moment
from lrc.cloning.start.streams import ActivationStore

METRIC_TOKENS = 4096
"""Tokens whose predictions form the metric."""
METRIC_MIX = 0.05
"""Share of the covariance of the head's rows in the metric, for tokens that are never predicted."""
RIDGE = 1e-3
"""Ridge of the tied head, in units of the stream's mean square."""
LOGIT_SCALES = tuple(percent / 100 for percent in range(50, 121, 5))
"""Factors of the student's logits that are tried."""
CHUNK = 512
"""Tokens whose logits are in memory at a time."""


@dataclass(frozen=True)
class OwnHead:
    """An LM head with its own projection P, whose rows are H_T diag(final gain) P."""

    key: ClassVar[str] = "head"
    """Name of the solved and refined value: that of its projection."""
    rows: Tensor
    """H_T diag(final gain), [vocabulary, d_T]."""

    def __call__(self, value: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """States [n, d] and rows [vocabulary, d] whose products are the student's logits.

        Args:
            value: P [d_T, d_S].
            z: the student's last residual stream, normalized, [n, d_S].
        """
        return z, self.rows @ value


@dataclass(frozen=True)
class TiedHead:
    """An LM head tied to the embedding of a student whose basis is rotated by R, after a final norm
    with gain s."""

    key: ClassVar[str] = "final gain"
    """Name of the solved and refined value; R is solved too."""
    rotation: Tensor | None
    """R [d_S, d_S]; None: the basis stays as it is."""
    rows: Tensor
    """H_T B R [vocabulary, d_S], times the scale of the logits."""

    def __call__(self, value: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """As for `OwnHead`, except that `value` is s [d_S]. z is not rotated yet."""
        turned = z if self.rotation is None else z @ self.rotation
        return turned * value, self.rows


StudentHead = OwnHead | TiedHead


def folded_head(calibration: Calibration) -> Tensor:
    """H_T diag(final gain), [vocabulary, d_T], times the scale of the logits."""
    family = calibration.family
    head = calibration.weight(family.head) * calibration.gain(family.final_norm)
    return head if calibration.logit_scale == 1 else head * calibration.logit_scale


def head_metric(calibration: Calibration, final: ActivationStore) -> Tensor:
    """The second-order term of KL(teacher || student) in the final normalized state.

    K = E[H^T (diag p - p p^T) H] + mix Cov(H) with H = H_T diag(final gain), over the teacher's
    predictions p.

    Args:
        calibration: the calibration.
        final: the teacher's last residual stream, [sequences, length, d_T].

    Returns:
        K [d_T, d_T] in float64.
    """
    head = folded_head(calibration)
    rows = torch.cat(list(_spread_rows(calibration, final)))
    mass, outer = torch.zeros_like(head[:, 0]), torch.zeros_like(head.T @ head)
    for start in range(0, len(rows), CHUNK):
        p = torch.softmax(calibration.cap(rows[start : start + CHUNK] @ head.T), -1)
        mass += p.sum(0)
        mean = p @ head
        outer += mean.T @ mean
    centered = head - head.mean(0)
    metric = ((head * mass[:, None]).T @ head - outer) / len(rows)
    return (metric + METRIC_MIX * centered.T @ centered / len(head)).double()


def logit_scale(
    calibration: Calibration,
    head: StudentHead,
    value: Tensor,
    stream: ActivationStore,
    final: ActivationStore,
) -> float:
    """The factor of the student's logits with the lowest KL(teacher || student) on tokens that no
    solve sees: a student that makes errors must not be as confident as its teacher.

    Args:
        calibration: the calibration.
        head: the student's head.
        value: the head's value.
        stream: the student's last residual stream, [sequences, length, d_S].
        final: the teacher's, [sequences, length, d_T].

    Returns:
        One of `LOGIT_SCALES`.
    """
    teacher_head, unseen = folded_head(calibration), calibration.solved_on
    z_all, h_all = (torch.cat(list(_spread_rows(calibration, x, unseen))) for x in (stream, final))
    divergence = torch.zeros(len(LOGIT_SCALES), dtype=torch.float64)
    states, rows = head(value, z_all)
    for start in range(0, len(states), CHUNK):
        logits = states[start : start + CHUNK] @ rows.T
        h = h_all[start : start + CHUNK]
        p = torch.softmax(calibration.cap(h @ teacher_head.T), -1)
        for i, scale in enumerate(LOGIT_SCALES):  # KL up to the teacher's entropy
            scaled = calibration.cap(scale * logits)
            divergence[i] += float((scaled.logsumexp(-1) - (p * scaled).sum(-1)).sum())
    return LOGIT_SCALES[int(divergence.argmin())]


def _spread_rows(
    calibration: Calibration, stream: ActivationStore, first: int = 0
) -> Iterator[Tensor]:
    """Every n-th token's normalized state, from sequence `first` on, in batches; METRIC_TOKENS or
    more in total."""
    sequences, length = calibration.ids.shape
    every = max(1, (sequences - first) * length // METRIC_TOKENS)
    for part in calibration.batches(first):
        skipped = -(part.start - first) * length % every
        yield calibration.normalize(stream[part].flatten(0, 1)[skipped::every])


def tied_head(
    calibration: Calibration, basis: Tensor, stream: ActivationStore, read: Tensor, metric: Tensor
) -> tuple[Tensor, Tensor]:
    """The rotation R [d_S, d_S] of the student's basis and its final gain s [d_S].

    RMSNorm commutes with rotations, so the student's basis B is free up to an orthogonal R.
    With Q = diag(gain)^-1 B and S = R diag(s) R^T, its logits H_T B R diag(s) R^T z are closest to
    the teacher's in the metric K when E |P z - Q S z|_K^2 is minimal over symmetric S, where P z is
    the estimate of the teacher's state from z. The minimum satisfies A S C + C S A = G + G^T with
    A = Q^T K Q, C = E[z z^T], G = Q^T K P C. It is solved in the basis M where M^T C M = 1 and
    M^T A M is diagonal. The ridge adds observations (z, c B z).

    Args:
        calibration: the calibration.
        basis: B [d_T, d_S].
        stream: the student's last residual stream, [sequences, length, d_S].
        read: P [d_T, d_S] that maps the student's z to the teacher's final h.
        metric: K [d_T, d_T].
    """
    second = torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float64, device=basis.device)
    for part in calibration.batches():
        second += second_moment(calibration.normalize(stream[part]))
    exact = basis.double()
    ridge = RIDGE * second.diagonal().mean()
    cross = read.double() @ second
    cross = cross + ridge * exact * ((exact * cross).sum() / second.trace())
    second = second + ridge * torch.eye(len(second), dtype=second.dtype, device=second.device)
    gain = calibration.gain(calibration.family.final_norm).double()
    q = torch.where(gain.abs() > 1e-6, 1 / gain, 0.0)[:, None] * exact
    a, g = q.T @ metric @ q, q.T @ metric @ cross
    values, vectors = torch.linalg.eigh(second)
    white = vectors * values.rsqrt()
    alpha, turn = torch.linalg.eigh(white.T @ a @ white)
    m = white @ turn
    inner = (m.T @ (g + g.T) @ m) / (alpha[:, None] + alpha[None, :])
    gains, rotation = torch.linalg.eigh(m @ inner @ m.T)
    return rotation.to(basis.dtype), gains.to(basis.dtype)


def diagonal_gains(
    calibration: Calibration, basis: Tensor, stream: ActivationStore, read: Tensor, metric: Tensor
) -> Tensor:
    """The final gain s [d_S] of a tied student whose basis must not be rotated: that with
    E |P z - Q diag(s) z|_K^2 minimal. Arguments and notation are those of `tied_head`."""
    exact = basis.double()
    second = torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float64, device=basis.device)
    for part in calibration.batches():
        second += second_moment(calibration.normalize(stream[part]))
    gain = calibration.gain(calibration.family.final_norm).double()
    q = torch.where(gain.abs() > 1e-6, 1 / gain, 0.0)[:, None] * exact
    cross = (q.T @ metric @ read.double() @ second).diagonal()
    solved: Tensor = torch.linalg.solve((q.T @ metric @ q) * second, cross)
    return solved.to(basis.dtype)
