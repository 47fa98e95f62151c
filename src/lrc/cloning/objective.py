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

from lrc.model.precision import upcast, upcast_dtype

LARGEST_EXPM1_ARGUMENT = 20.0
"""Largest difference of scaled logits, less its mean, up to which the KL is summed by e^d - 1."""

CACHED_LOGITS = 4 * 49_152
"""Logits that a CPU's thread works on at once; with all that is formed beside them, 3 MB."""


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
    token_lm: Tensor | None = None,
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
        token_lm: [n], overwritten by the cross-entropy of each token in nats, 0 where it has no
            label; None: that is not wanted.
    """
    losses = _Vocabulary.apply(  # type: ignore[no-untyped-call]
        student_hidden, student_head, teacher_hidden, teacher_head, labels, mask, weights, token_lm
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
        token_lm: Tensor | None,
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
                logits = upcast(hidden @ head.T)
                scaled = None
                if weights.kl_weight:
                    scaled = teacher_hidden[rows].to(dtype) / weights.temperature
                    scaled = upcast(scaled @ frozen_head.T)
                chunk_mask = None if mask is None else mask[rows]
                chunk_token_lm = None if token_lm is None else token_lm[rows]
                chunk_kl, chunk_lm = _differentiate(
                    logits, scaled, labels[rows], chunk_mask, weights, chunk_token_lm
                )
                kl += chunk_kl
                lm += chunk_lm
                grad_logits = logits.to(dtype)
                grad_hidden[rows] = grad_logits @ head
                if dtype == grad_head.dtype:
                    grad_head[: weights.vocab].addmm_(grad_logits.T, hidden)
                else:
                    grad_head[: weights.vocab] += grad_logits.T @ hidden
                del logits, scaled, grad_logits  # so that the next chunk's take their place
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(kl, lm)
        weighted = weights.kl_weight * kl + weights.lm_weight * lm
        return weighted, kl, lm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_head, None, None, None, None, None, None


def _differentiate(
    logits: Tensor,
    scaled_teacher: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    weights: VocabularyWeights,
    token_lm: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """T^2 * KL_T and LM of a chunk; its logits become the gradient of the weighted losses.

    On a CPU the many passes over the vocabulary are done on a few rows at a time, which stay in the
    cache from one pass to the next.

    Args:
        logits: s, [chunk, vocab]; overwritten by the gradient.
        scaled_teacher: t / T, [chunk, vocab]; overwritten; None where the KL has no weight.
        labels: int64 [chunk], negative where there is none.
        mask: bool [chunk] or None.
        token_lm: [chunk] or None; overwritten by the cross-entropy of each token.

    Returns:
        The chunk's shares of T^2 * KL_T and LM.
    """
    kl, lm = logits.new_zeros(()), logits.new_zeros(())
    step = len(logits)
    if logits.device.type == "cpu":
        step = max(1, CACHED_LOGITS // logits.shape[1]) * torch.get_num_threads()
    p, work = (torch.empty_like(logits[:step]) for _ in range(2))
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        s, grad = logits[rows], None
        if scaled_teacher is not None:
            counted, n = None if mask is None else mask[rows], len(s)
            grad, block_kl = _kl(s, scaled_teacher[rows], counted, weights, p[:n], work[:n])
            kl += block_kl
        block_lm, losses = _cross_entropy(s, labels[rows], weights)
        if token_lm is not None:
            token_lm[rows] = losses
        lm += block_lm
        if grad is not None:
            s += grad
    return kl, lm


def _cross_entropy(
    logits: Tensor, labels: Tensor, weights: VocabularyWeights
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of some rows divided by `weights.labels`.

    Args:
        logits: [n, vocab]; overwritten by the gradient of lm_weight * loss.
        labels: int64 [n], negative where there is none.

    Returns:
        The loss, and the cross-entropy of each row [n], undivided and 0 where there is no label.
    """
    learned = labels >= 0
    safe = labels.clamp(min=0)[:, None]
    logits.sub_(logits.amax(-1, keepdim=True))
    right = logits.gather(1, safe)
    total = logits.exp_().sum(-1, keepdim=True)
    losses = torch.where(learned, (total.log() - right)[:, 0], 0)
    scale = learned[:, None].to(logits.dtype) * (weights.lm_weight / weights.labels)
    logits.mul_(scale / total).scatter_add_(1, safe, -scale)
    return losses.sum() / weights.labels, losses


def _kl(
    logits: Tensor,
    scaled_teacher: Tensor,
    mask: Tensor | None,
    weights: VocabularyWeights,
    p: Tensor,
    work: Tensor,
) -> tuple[Tensor, Tensor]:
    """T^2 * KL_T of some rows divided by `weights.tokens`, and its weighted gradient.

    At T = 40 both distributions are almost flat and nearly equal, so the usual sum of p log(p / q)
    cancels to noise in float32. With d = (s - t) / T less its mean under p, the divergence is
    log(1 + sum p (e^d - 1)) and q - p = p (e^d - 1 - r) / (1 + r), r being that sum: nothing
    large is subtracted. e^d - 1 = tanh(d / 2) (e^d + 1) is as exact as `expm1` and takes two thirds
    of its time on a CPU. Rows where a d is large take the usual sum, which is exact there.

    Args:
        logits: s, the student's logits, [n, vocab].
        scaled_teacher: t / T, [n, vocab]; overwritten by the gradient.
        mask: bool [n] or None.
        p: [n, vocab], overwritten.
        work: [n, vocab], overwritten.

    Returns:
        The gradient of kl_weight * loss by the logits [n, vocab], and the loss.
    """
    temperature = weights.temperature
    torch.sub(scaled_teacher, scaled_teacher.amax(-1, keepdim=True), out=p).exp_()
    total = p.sum(-1, keepdim=True)  # p is divided by it where it has become a number a row
    minus_d = scaled_teacher.sub_(logits, alpha=1 / temperature)
    mean = torch.mul(p, minus_d, out=work).sum(-1, keepdim=True) / total
    far = (mean - minus_d.amin(-1, keepdim=True) > LARGEST_EXPM1_ARGUMENT)[:, 0]
    usual = None
    if far.any():
        usual = _usual_kl(logits[far] / temperature, minus_d[far])
        minus_d[far] = mean[far]  # keeps e^d from overflowing
    tanh = torch.sub(mean / 2, minus_d, alpha=0.5, out=work).tanh_()
    d = torch.sub(mean, minus_d, out=minus_d)
    torch.addcmul(tanh, tanh, d.exp_(), out=d)  # e^d - 1
    r = torch.mul(p, d, out=work).sum(-1, keepdim=True) / total
    kl = torch.log1p(r)
    scale = torch.full_like(r, 1 / weights.tokens)
    if mask is not None:
        scale *= mask[:, None]
    factor = weights.kl_weight * temperature * scale
    by_row = factor / ((1 + r) * total)
    grad = d.mul_(by_row).sub_(r * by_row).mul_(p)
    if usual is not None:
        kl[far], difference = usual
        grad[far] = difference * factor[far]
    return grad, temperature**2 * (kl * scale).sum()


def _usual_kl(scaled_student: Tensor, minus_d: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) [n, 1] and q - p [n, vocab] from s / T and (t - s) / T, both [n, vocab]."""
    log_q = torch.log_softmax(scaled_student, dim=-1)
    log_p = torch.log_softmax(scaled_student + minus_d, dim=-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1, keepdim=True), log_q.exp() - p


def clone_term(
    student: Tensor,
    target: Tensor,
    weight: Tensor | None,
    tokens: int,
    factors: tuple[Tensor, Tensor] | None = None,
    reuse_target_buffer: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean squared difference over the elements of the tokens that count (paper section 3.2).

    Args:
        student: [batch, sequence, width].
        target: the teacher's side, [batch, sequence, width]; differentiable too.
        weight: what each token weighs, [batch, sequence], no gradient: a bool mask, or
            `relative_weight`; None: all weigh 1.
        tokens: number of tokens to average over.
        factors: a_T [batch, sequence, d_T] without gradient and P [d_T, width], where the target
            is their product, given without gradient. P gets its gradient, which is formed at once:
            so a_T need not be kept until the backward pass.
        reuse_target_buffer: whether the target, where it takes no gradient, may be overwritten: the
        difference is
            then kept in its memory.

    Returns:
        The student's activation, for the model to go on with, and the loss, a scalar. Going on
        with what is returned lets one pass add up the gradients of the loss and of the model.
    """
    scale = 1 / (tokens * student.shape[-1])
    source, projection = factors or (None, None)
    return _SquaredDifference.apply(  # type: ignore[no-untyped-call]
        student, target, projection, source, weight, scale, reuse_target_buffer
    )


def relative_weight(target: Tensor, mask: Tensor | None) -> Tensor:
    """Token weights that make a clone term a relative error: 1 / (m + median of m), m being the
    mean square of the teacher's side of a token.

    A few tokens carry massive activations, hundreds of times the rest, which rule the plain mean
    squared difference; here every token counts for about the same, and so does every layer. The
    median is that of the micro-batch.

    Args:
        target: the teacher's side, [batch, sequence, width].
        mask: bool [batch, sequence], false where a token does not count; None: all count.

    Returns:
        Weights [batch, sequence], zero where masked, in float32 at least.
    """
    truth = upcast(target.detach())
    mean_square = torch.linalg.vecdot(truth, truth) / target.shape[-1]
    counted = mean_square if mask is None else mean_square[mask]
    weight = 1 / (mean_square + counted.median()).clamp_min(torch.finfo(truth.dtype).tiny)
    return weight if mask is None else weight * mask


class _SquaredDifference(torch.autograd.Function):
    """scale * weighted sum of squared differences, keeping the difference alone for the backward
    pass, and the gradient of the projection that the target came by."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        target: Tensor,
        projection: Tensor | None,
        source: Tensor | None,
        weight: Tensor | None,
        scale: float,
        reuse_target_buffer: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = student.dtype, target.dtype
        exact = student.dtype == target.dtype == upcast_dtype(target)
        if reuse_target_buffer and exact and not ctx.needs_input_grad[1]:
            difference = torch.sub(student, target, out=target)
        else:
            difference = upcast(student - target)
        weighted = difference if weight is None else difference * weight[..., None]
        unit = None  # the gradient of the projection for a loss that counts once
        if projection is not None and source is not None and ctx.needs_input_grad[2]:
            rows = weighted.flatten(0, -2).to(source.dtype)
            unit = -2 * scale * (source.flatten(0, -2).T @ rows).to(projection.dtype)
        ctx.save_for_backward(weighted, unit)
        ctx.scale = scale
        loss = scale * torch.dot(weighted.flatten(), difference.flatten())
        return student.view_as(student), loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_student: Tensor, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        weighted, unit = ctx.saved_tensors
        factor = 2 * ctx.scale * grad_loss
        student, target = ctx.dtypes
        grad_target = (weighted * -factor).to(target) if ctx.needs_input_grad[1] else None
        grad_projection = None if unit is None else unit * grad_loss
        grad = None
        if ctx.needs_input_grad[0]:
            grad = torch.addcmul(grad_student, weighted, factor).to(student)
        return grad, grad_target, grad_projection, None, None, None, None
