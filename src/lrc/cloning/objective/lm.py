"""LM: the mean next-token cross-entropy."""

import torch
from torch import Tensor


def cross_entropy(
    logits: Tensor, labels: Tensor, lm_weight: float, count: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a block of rows, divided by the number of labels to average over.

    Args:
        logits: [n, vocab]; overwritten by the gradient of lm_weight * loss.
        labels: next tokens, int64 [n]; negative for rows without one.
        lm_weight: weight of the loss in the gradient.
        count: number of labels to average the loss over.

    Returns:
        The loss, and the cross-entropy of each row [n], not divided; 0 for rows without a label.
    """
    learned = labels >= 0
    safe = labels.clamp(min=0)[:, None]
    logits.sub_(logits.amax(-1, keepdim=True))
    right = logits.gather(1, safe)
    total = logits.exp_().sum(-1, keepdim=True)
    losses = torch.where(learned, (total.log() - right)[:, 0], 0)
    scale = learned[:, None].to(logits.dtype) * (lm_weight / count)
    logits.mul_(scale / total).scatter_add_(1, safe, -scale)
    return losses.sum() / count, losses
