"""The losses over the vocabulary, D_T + LM, from the last hidden states of both models.

Cost: at any time, only the logits of at most `chunk_tokens` tokens exist. The forward pass computes
the gradients, chunk by chunk, so nothing is computed twice.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lrc.cloning.objective.divergence import Rows, find_divergence, find_reference
from lrc.cloning.objective.lm import cross_entropy
from lrc.model.precision import product_dtype, upcast, upcast_dtype

CACHED_LOGITS = 4 * 49_152
"""Logits that a CPU thread processes at once; 3 MB with all intermediate results."""


class VocabularyLosses(NamedTuple):
    """Losses over the vocabulary, all scalars."""

    weighted: Tensor
    """kl_weight * T^2 * D_T + lm_weight * LM; the only one with gradients."""

    divergence: Tensor
    """T^2 * D_T, without its weight."""

    lm: Tensor
    """LM, without its weight, in nats."""


class VocabularyWeights(NamedTuple):
    """How the vocabulary losses are weighted, averaged and chunked."""

    kl_weight: float
    lm_weight: float
    temperature: float
    tokens: int
    """Number of tokens to average the divergence over."""
    labels: int
    """Number of labels to average the LM loss over."""
    vocab: int
    """Number of real tokens in the heads. Rows beyond it are padding and never count."""
    chunk_tokens: int
    """Number of tokens whose logits are in memory at once."""
    divergence: str = "kl"
    """Name of D_T (`lrc.recipe.sections.Divergence`); its weight is kl_weight."""
    jsd_beta: float = 0.5
    """Weight of the teacher in the mixture of `jsd`."""
    softcap: float | None = None
    """c if the logits of both models are c tanh(logits / c)."""
    triton: bool = False
    """Whether to use the Triton kernel (`lrc.cloning.kernels.vocabulary`). It has only the KL, up
    to float32; anything else still runs in torch."""


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
    """Compute D_T and LM from the last hidden states of both models.

    Args:
        student_hidden: after the final norm, [n, d_S].
        student_head: [rows, d_S].
        teacher_hidden: after the final norm, [n, d_T], no gradient.
        teacher_head: [rows, d_T], no gradient.
        labels: next tokens, int64 [n]; negative for tokens without one.
        mask: bool [n], false for tokens that D_T ignores; None: use all.
        weights: loss weights, counts and chunk size.
        token_lm: [n], overwritten by the cross-entropy of each token in nats, 0 for tokens without
            a label; None: do not return it.
    """
    losses = _Vocabulary.apply(  # type: ignore[no-untyped-call]
        student_hidden, student_head, teacher_hidden, teacher_head, labels, mask, weights, token_lm
    )
    return VocabularyLosses(*losses)


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor | None:
    """Replace logits by c tanh(logits / c), in place, and return the slope of that; with no c, do
    nothing and return None."""
    if softcap is None:
        return None
    tanh = logits.div_(softcap).tanh_()
    slope = 1 - tanh.square()
    tanh.mul_(softcap)
    return slope


class _Vocabulary(torch.autograd.Function):
    """`vocabulary_losses`, computing the gradients together with the losses."""

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
        device, dtype = student_hidden.device.type, product_dtype(student_hidden)
        head = student_head[: weights.vocab].to(dtype)
        frozen_head = teacher_head[: weights.vocab].to(dtype)
        cap, has_kernel = weights.softcap, weights.divergence == "kl" or not weights.kl_weight
        fused = weights.triton and has_kernel and dtype.itemsize <= 4
        grad_hidden = torch.empty_like(student_hidden)
        grad_head = torch.zeros_like(student_head, dtype=upcast_dtype(student_head))
        kl = student_hidden.new_zeros((), dtype=upcast_dtype(student_hidden))
        lm = torch.zeros_like(kl)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(student_hidden), weights.chunk_tokens):
                rows = slice(start, start + weights.chunk_tokens)
                hidden = student_hidden[rows].to(dtype)
                logits = hidden @ head.T
                scaled = None
                if weights.kl_weight:
                    scaled = teacher_hidden[rows].to(dtype) / weights.temperature
                    scaled = scaled @ frozen_head.T
                chunk_mask = None if mask is None else mask[rows]
                chunk_token_lm = None if token_lm is None else token_lm[rows]
                slope = None
                if not fused:
                    logits = upcast(logits)
                    slope = cap_logits(logits, cap)
                    if scaled is not None:
                        scaled = upcast(scaled)
                        cap_logits(scaled, cap and cap / weights.temperature)
                chunk_kl, chunk_lm = (_differentiate_fused if fused else _differentiate)(
                    logits, scaled, labels[rows], chunk_mask, weights, chunk_token_lm
                )
                kl += chunk_kl
                lm += chunk_lm
                if slope is not None:
                    logits *= slope
                grad_logits = logits.to(dtype)
                grad_hidden[rows] = grad_logits @ head
                add_product(grad_head[: weights.vocab], grad_logits.T, hidden)
                del logits, scaled, slope, grad_logits  # the next chunk can use their memory
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(kl, lm)
        weighted = weights.kl_weight * kl + weights.lm_weight * lm
        return weighted, kl, lm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_head, None, None, None, None, None, None


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in the precision of the total.

    Args:
        total: [n, m], at least float32.
        a: [n, k]; also bfloat16 or float16.
        b: [k, m], like a.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # a CPU has no such product, so it rounds the new part
        total += a @ b


def _differentiate(
    logits: Tensor,
    scaled_teacher: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    weights: VocabularyWeights,
    token_lm: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """T^2 * D_T and LM of a chunk. Overwrites its logits with the gradient of the weighted losses.

    On a CPU, the many passes over the vocabulary process a few rows at a time, which stay in the
    cache from pass to pass.

    Args:
        logits: s, [chunk, vocab]; overwritten by the gradient.
        scaled_teacher: t / T, [chunk, vocab]; overwritten; None if D_T has no weight.
        labels: int64 [chunk]; negative for tokens without one.
        mask: bool [chunk] or None.
        token_lm: [chunk] or None; overwritten by the cross-entropy of each token.

    Returns:
        The chunk's shares of T^2 * D_T and LM.
    """
    divergence, temperature = find_divergence(weights.divergence), weights.temperature
    total, lm = logits.new_zeros(()), logits.new_zeros(())
    step = len(logits)
    if logits.device.type == "cpu":
        step = max(1, CACHED_LOGITS // logits.shape[1]) * torch.get_num_threads()
    first, second = (torch.empty_like(logits[:step]) for _ in range(2))
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        s, gradient = logits[rows], None
        if scaled_teacher is not None:
            scale = torch.full_like(s[:, :1], 1 / weights.tokens)
            if mask is not None:
                scale *= mask[rows, None]
            factor = weights.kl_weight * temperature * scale
            buffers = first[: len(s)], second[: len(s)]
            values, gradient = divergence(
                Rows(s, scaled_teacher[rows], temperature, factor, weights.jsd_beta, buffers)
            )
            total += temperature**2 * (values * scale).sum()
        block_lm, losses = cross_entropy(s, labels[rows], weights.lm_weight, weights.labels)
        if token_lm is not None:
            token_lm[rows] = losses
        lm += block_lm
        if gradient is not None:
            s += gradient
    return total, lm


def _differentiate_fused(
    logits: Tensor,
    scaled_teacher: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    weights: VocabularyWeights,
    token_lm: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`_differentiate` by the Triton kernel. Logits come before the softcap, in any element type up
    to float32."""
    from lrc.cloning.kernels.vocabulary import losses_in_place

    kl, lm = losses_in_place(
        logits,
        scaled_teacher,
        labels,
        mask,
        kl_weight=weights.kl_weight,
        lm_weight=weights.lm_weight,
        temperature=weights.temperature,
        tokens=weights.tokens,
        label_count=weights.labels,
        softcap=weights.softcap,
    )
    if token_lm is not None:
        token_lm.copy_(lm)
    return weights.temperature**2 * kl.sum() / weights.tokens, lm.sum() / weights.labels


def naive_vocabulary_losses(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    weights: VocabularyWeights,
) -> VocabularyLosses:
    """`vocabulary_losses` from all logits at once, with gradients from autograd: its reference in
    tests."""
    t = weights.temperature
    student = (student_hidden @ student_head.T)[:, : weights.vocab]
    teacher = (teacher_hidden @ teacher_head.T)[:, : weights.vocab]
    if (c := weights.softcap) is not None:
        student, teacher = c * (student / c).tanh(), c * (teacher / c).tanh()
    log_p, log_q = (teacher / t).log_softmax(-1), (student / t).log_softmax(-1)
    by_token = find_reference(weights.divergence)(log_p, log_q, weights.jsd_beta)
    if mask is not None:
        by_token = by_token[mask]
    divergence = t**2 * by_token.sum() / weights.tokens
    learned = labels >= 0
    lm = functional.cross_entropy(student[learned], labels[learned], reduction="sum")
    lm = lm / weights.labels
    weighted = weights.kl_weight * divergence + weights.lm_weight * lm
    return VocabularyLosses(weighted, divergence, lm)
