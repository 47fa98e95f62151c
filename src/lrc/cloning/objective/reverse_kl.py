"""KL(student || teacher), which penalizes tokens that the teacher finds unlikely.

With e = (s - t) / T minus its mean under q, log q - log p - KL(q || p) = e exactly. So the gradient
with respect to s / T is q e, and the divergence is log(1 + sum q (exp(-e) - 1)), which subtracts no
large numbers. Sources: MiniLLM (arXiv 2306.08543), GKD (arXiv 2306.13649).
"""

import torch
from torch import Tensor

from lrc.cloning.objective.divergence import LARGEST_EXPM1_ARGUMENT, Rows


def divergence(rows: Rows) -> tuple[Tensor, Tensor]:
    """KL(q || p) and its gradient, as `DivergenceFunction`; q is the student's."""
    scaled = rows.logits / rows.temperature
    q = torch.softmax(scaled, dim=-1, out=rows.buffers[0])
    e = torch.sub(scaled, rows.scaled_teacher, out=rows.buffers[1])
    e -= (q * e).sum(-1, keepdim=True)
    kl = torch.log1p((q * torch.expm1(-e.clamp_min(-LARGEST_EXPM1_ARGUMENT))).sum(-1, keepdim=True))
    far = e.amin(-1) < -LARGEST_EXPM1_ARGUMENT
    log_q, log_p = scaled.log_softmax(-1), rows.scaled_teacher.log_softmax(-1)
    usual = (q * (log_q - log_p)).sum(-1, keepdim=True)
    return torch.where(far[:, None], usual, kl), e.mul_(q).mul_(rows.factor)


def reference(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The same [n] from log-probabilities [n, vocab], with gradients from autograd."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)
