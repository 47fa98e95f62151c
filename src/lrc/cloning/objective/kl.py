"""KL(teacher || student), the paper's divergence.

At T = 40, both distributions are almost flat and nearly equal, so the usual sum of p log(p / q)
cancels to noise in float32. Let d = (s - t) / T minus its mean under p, and r = sum p (e^d - 1).
Then the divergence is log(1 + r), and q - p = p (e^d - 1 - r) / (1 + r). This subtracts no large
numbers. e^d - 1 = tanh(d / 2) (e^d + 1) is as exact as `expm1` and takes two thirds of its time on
a CPU.

Rows that are far apart use the usual sums. A CPU asks which rows these are. It would have to wait
for a GPU's answer, so on a GPU both are computed for all rows.
"""

import torch
from torch import Tensor

from lrc.cloning.objective.divergence import LARGEST_EXPM1_ARGUMENT, Rows, answers_at_once


def divergence(rows: Rows) -> tuple[Tensor, Tensor]:
    """KL(p || q) and its gradient, as `DivergenceFunction`; p is the teacher's."""
    logits, scaled_teacher, factor = rows.logits, rows.scaled_teacher, rows.factor
    p, work = rows.buffers
    largest = scaled_teacher.amax(-1, keepdim=True)
    torch.sub(scaled_teacher, largest, out=p).exp_()
    total = p.sum(-1, keepdim=True)  # divides sums over p, which are one number per row
    minus_d = scaled_teacher.sub_(logits, alpha=1 / rows.temperature)
    mean = torch.mul(p, minus_d, out=work).sum(-1, keepdim=True) / total
    far = (mean - minus_d.amin(-1, keepdim=True) > LARGEST_EXPM1_ARGUMENT)[:, 0]
    usual = None
    if answers_at_once(far) and far.any():
        usual = _usual_kl(logits[far] / rows.temperature, minus_d[far])
        minus_d[far] = mean[far]  # keeps e^d from overflowing
    tanh = torch.sub(mean / 2, minus_d, alpha=0.5, out=work).tanh_()
    d = torch.sub(mean, minus_d, out=minus_d)
    torch.addcmul(tanh, tanh, d.exp_(), out=d)  # e^d - 1
    r = torch.mul(p, d, out=work).sum(-1, keepdim=True) / total
    kl = torch.log1p(r)
    by_row = factor / ((1 + r) * total)
    gradient = d.mul_(by_row).sub_(r * by_row).mul_(p)
    if usual is not None:
        kl[far], difference = usual
        gradient[far] = difference * factor[far]
    elif not answers_at_once(far):
        q = logits / rows.temperature
        largest_q = q.amax(-1, keepdim=True)
        total_q = q.sub_(largest_q).exp_().sum(-1, keepdim=True)
        usual_kl = mean - largest - total.log() + largest_q + total_q.log()
        difference = q.mul_(factor / total_q).addcmul_(p, -factor / total)
        kl = torch.where(far[:, None], usual_kl, kl)
        torch.where(far[:, None], difference, gradient, out=gradient)
    return kl, gradient


def _usual_kl(scaled_student: Tensor, minus_d: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) [n, 1] and q - p [n, vocab] from s / T and (t - s) / T, both [n, vocab]."""
    log_q = torch.log_softmax(scaled_student, dim=-1)
    log_p = torch.log_softmax(scaled_student + minus_d, dim=-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1, keepdim=True), log_q.exp() - p


def reference(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The same [n] from log-probabilities [n, vocab], with gradients from autograd."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
