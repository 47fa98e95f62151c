"""The losses, as pure functions of tensors: KL + LM over the vocabulary, and the clone terms.

L = kl_weight * T^2 * KL_T + lm_weight * LM + alpha * sum of clone terms (paper section 3.2).

* KL_T = mean over tokens of KL(teacher || student) between softmax(logits / T). The official code
  sums over positions, divides by the batch size only and applies no T^2: at sequences of 2,048 and
  T = 40 that is 2048 / 1600 = 1.28 times T^2 times the token mean. Ours does not depend on the
  shape of the batch.
* LM = mean next-token cross-entropy over the tokens that have a label.
* A clone term = mean squared difference over all elements of unmasked tokens.

Means are taken over counts that the caller gives, so that micro-batches of one step add up to the
loss of the whole step.

Cost: the vocabulary losses never hold the logits of more than `chunk_tokens` tokens. Their
gradients are formed in the forward pass, chunk by chunk, so nothing is computed twice. A clone
term keeps one buffer, the difference.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FAR = 20.0
"""Largest difference of scaled logits, less its mean, up to which the KL is summed by e^d - 1."""


class VocabularyLosses(NamedTuple):
    """Losses over the vocabulary, all scalars."""

    weighted: Tensor
    """kl_weight * T^2 * KL_T + lm_weight * LM; the one that carries gradients."""

    kl: Tensor
    """T^2 * KL_T, without its weight."""

    lm: Tensor
    """LM, without its weight, in nats."""


class VocabularyWeights(NamedTuple):
    """How the vocabulary losses are weighted, averaged and chunked."""

    kl_weight: float
    lm_weight: float
    temperature: float
    tokens: int
    """Tokens that the KL is averaged over."""
    labels: int
    """Labels that the LM loss is averaged over."""
    vocab: int
    """Rows of the heads that are real tokens; rows beyond are padding and never count."""
    chunk_tokens: int
    """Tokens whose logits are held at once."""


def vocabulary_losses(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    weights: VocabularyWeights,
) -> VocabularyLosses:
    """KL and LM losses from the last hidden states of both models.

    Args:
        student_hidden: after the final norm, [n, d_S].
        student_head: [rows, d_S].
        teacher_hidden: after the final norm, [n, d_T], no gradient.
        teacher_head: [rows, d_T], no gradient.
        labels: next tokens, int64 [n]; negative where there is none.
        mask: bool [n], false where the KL does not count; None: all count.
        weights: loss weights, counts and chunk size.
    """
    losses = _Vocabulary.apply(  # type: ignore[no-untyped-call]
        student_hidden, student_head, teacher_hidden, teacher_head, labels, mask, weights
    )
    return VocabularyLosses(*losses)


class _Vocabulary(torch.autograd.Function):
    """`vocabulary_losses` with the gradients formed beside the losses."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        weights: VocabularyWeights,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = student_hidden.device.type
        dtype = student_hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        head = student_head[: weights.vocab].to(dtype)
        frozen_head = teacher_head[: weights.vocab].to(dtype)
        grad_hidden = torch.empty_like(student_hidden)
        grad_head = torch.zeros_like(student_head)
        kl = student_hidden.new_zeros(())
        lm = student_hidden.new_zeros(())
        with torch.autocast(device, enabled=False):
            for start in range(0, len(student_hidden), weights.chunk_tokens):
                rows = slice(start, start + weights.chunk_tokens)
                hidden = student_hidden[rows].to(dtype)
                logits = _wide(hidden @ head.T)
                grad_lm, chunk_lm = _cross_entropy(logits, labels[rows], weights)
                lm += chunk_lm
                grad_logits = grad_lm
                if weights.kl_weight:
                    scaled = teacher_hidden[rows].to(dtype) / weights.temperature
                    chunk_mask = None if mask is None else mask[rows]
                    grad_kl, chunk_kl = _kl(
                        logits, _wide(scaled @ frozen_head.T), chunk_mask, weights
                    )
                    kl += chunk_kl
                    grad_logits = grad_kl if grad_lm is None else grad_kl.add_(grad_lm)
                if grad_logits is None:
                    grad_hidden[rows] = 0
                    continue
                grad_logits = grad_logits.to(dtype)
                grad_hidden[rows] = grad_logits @ head
                grad_head[: weights.vocab] += (grad_logits.T @ hidden).to(grad_head.dtype)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(kl, lm)
        weighted = weights.kl_weight * kl + weights.lm_weight * lm
        return weighted, kl, lm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_head, None, None, None, None, None


def _wide(logits: Tensor) -> Tensor:
    """Logits in float32 at least: softmax over a large vocabulary needs it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _cross_entropy(
    logits: Tensor, labels: Tensor, weights: VocabularyWeights
) -> tuple[Tensor | None, Tensor]:
    """Cross-entropy of a chunk divided by `weights.labels`, and its weighted gradient.

    Args:
        logits: [chunk, vocab].
        labels: int64 [chunk], negative where there is none.

    Returns:
        The gradient of lm_weight * loss by the logits [chunk, vocab] (None where lm_weight is 0),
        and the loss.
    """
    learned = labels >= 0
    safe = labels.clamp(min=0)[:, None]
    norm = torch.logsumexp(logits, dim=-1, keepdim=True)
    losses = (norm - logits.gather(1, safe)).squeeze(1)
    loss = torch.where(learned, losses, 0).sum() / weights.labels
    if not weights.lm_weight:
        return None, loss
    grad = torch.sub(logits, norm).exp_()
    grad.scatter_add_(1, safe, grad.new_full(safe.shape, -1.0))
    grad.mul_(learned[:, None].to(grad.dtype) * (weights.lm_weight / weights.labels))
    return grad, loss


def _kl(
    logits: Tensor, scaled_teacher: Tensor, mask: Tensor | None, weights: VocabularyWeights
) -> tuple[Tensor, Tensor]:
    """T^2 * KL_T of a chunk divided by `weights.tokens`, and its weighted gradient.

    At T = 40 both distributions are almost flat and nearly equal, so the usual sum of p log(p / q)
    cancels to noise in float32. With d = (s - t) / T less its mean under p, the divergence is
    log(1 + sum p (e^d - 1)) and q - p = p (e^d - 1 - r) / (1 + r), r being that sum: nothing
    large is subtracted. (Differences are cut at 80 so that a student far off cannot overflow e^d.)

    Args:
        logits: s, the student's logits, [chunk, vocab].
        scaled_teacher: t / T, [chunk, vocab]; overwritten.
        mask: bool [chunk] or None.

    Returns:
        The gradient of kl_weight * loss by the logits [chunk, vocab], and the loss.
    """
    temperature = weights.temperature
    p = torch.softmax(scaled_teacher, dim=-1)
    teacher_norm = scaled_teacher.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
    d = scaled_teacher.neg_().add_(logits, alpha=1 / temperature)
    mean = _row_dot(p, d)
    d.sub_(mean)
    far = d.amax(dim=-1, keepdim=True) > FAR
    d.clamp_(max=FAR).expm1_()
    r = _row_dot(p, d)
    kl = torch.log1p(r)
    grad = d.sub_(r).mul_(p).div_(1 + r)
    if far.any():
        rows = far[:, 0]
        scaled = logits[rows] / temperature
        norm = torch.logsumexp(scaled, dim=-1, keepdim=True)
        kl[rows] = norm - teacher_norm[rows] - mean[rows]
        grad[rows] = torch.exp(scaled - norm) - p[rows]
    scale = 1 / weights.tokens * torch.ones_like(r)
    if mask is not None:
        scale *= mask[:, None]
    loss = temperature**2 * (kl * scale).sum()
    return grad.mul_(weights.kl_weight * temperature * scale), loss


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot product of every row, [n, v] and [n, v] to [n, 1], without a product of full size."""
    return torch.bmm(a[:, None, :], b[:, :, None])[:, :, 0]


def clone_term(student: Tensor, target: Tensor, mask: Tensor | None, tokens: int) -> Tensor:
    """Mean squared difference over the elements of unmasked tokens (paper section 3.2).

    Args:
        student: [batch, sequence, width].
        target: the teacher's side, [batch, sequence, width]; differentiable too where it is
            projected.
        mask: bool [batch, sequence], true for the tokens that count; None: all count.
        tokens: number of tokens to average over.
    """
    scale = 1 / (tokens * student.shape[-1])
    return _SquaredDifference.apply(student, target, mask, scale)  # type: ignore[no-untyped-call]


class _SquaredDifference(torch.autograd.Function):
    """scale * sum of squared differences, keeping the difference alone for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, target: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        difference = student - target
        difference = difference.to(torch.promote_types(difference.dtype, torch.float32))
        if mask is not None:
            difference *= mask[..., None]
        ctx.save_for_backward(difference)
        ctx.scale = scale
        ctx.dtypes = student.dtype, target.dtype
        flat = difference.flatten()
        return scale * torch.dot(flat, flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (difference,) = ctx.saved_tensors
        scaled = difference * (2 * ctx.scale * grad)
        student, target = ctx.dtypes
        return (
            scaled.to(student) if ctx.needs_input_grad[0] else None,
            -scaled.to(target) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )
