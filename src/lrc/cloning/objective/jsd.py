"""The generalized Jensen-Shannon divergence, which is between both directions of KL.

JSD = beta KL(p || m) + (1 - beta) KL(q || m), with the mixture m = beta p + (1 - beta) q of the
teacher's p and the student's q, as in GKD (arXiv 2306.13649). Its gradient with respect to s / T is
(1 - beta) q (log(q / m) - KL(q || m)).

With d, r and x = q / p - 1 computed as in `kl`, log(p / m) = -log(1 + (1 - beta) x). This subtracts
no large numbers when p and q nearly agree. Rows that are far apart use log-probabilities.
"""

import math

import torch
from torch import Tensor

from lrc.cloning.objective.divergence import LARGEST_EXPM1_ARGUMENT, Rows, answers_at_once


def divergence(rows: Rows) -> tuple[Tensor, Tensor]:
    """JSD and its gradient, as `DivergenceFunction`."""
    beta, scaled = rows.beta, rows.logits / rows.temperature
    p = torch.softmax(rows.scaled_teacher, dim=-1, out=rows.buffers[0])
    q = torch.softmax(scaled, dim=-1, out=rows.buffers[1])
    d = scaled - rows.scaled_teacher
    d -= (p * d).sum(-1, keepdim=True)
    far = d.abs().amax(-1, keepdim=True) > LARGEST_EXPM1_ARGUMENT
    growth = torch.expm1(d.clamp(-LARGEST_EXPM1_ARGUMENT, LARGEST_EXPM1_ARGUMENT))
    r = (p * growth).sum(-1, keepdim=True)
    x = (growth - r) / (1 + r)
    p_over_m = -torch.log1p((1 - beta) * x)
    q_over_m = d - torch.log1p(r) + p_over_m  # d - log(1 + r) is log(q / p)
    if not answers_at_once(far) or far.any():
        log_p, log_q = rows.scaled_teacher.log_softmax(-1), scaled.log_softmax(-1)
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        p_over_m = torch.where(far, log_p - log_m, p_over_m)
        q_over_m = torch.where(far, log_q - log_m, q_over_m)
    student = (q * q_over_m).sum(-1, keepdim=True)
    value = beta * (p * p_over_m).sum(-1, keepdim=True) + (1 - beta) * student
    return value, (1 - beta) * rows.factor * q * (q_over_m - student)


def reference(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The same [n] from log-probabilities [n, vocab], with gradients from autograd."""
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    student = (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * teacher + (1 - beta) * student
