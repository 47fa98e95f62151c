"""The activation clone: squared differences between the student's and teacher's activations.

A clone term is the mean squared difference over all elements of the unmasked tokens (paper
section 3.2). Its fast path keeps only one buffer for the backward pass: the difference.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrc.model.precision import upcast, upcast_dtype


def compare_activations(
    student: Tensor,
    target: Tensor,
    mask: Tensor | None,
    tokens: int,
    relative: bool,
    factors: tuple[Tensor, Tensor] | None = None,
    reuse_target_buffer: bool = False,
    triton: bool = False,
) -> tuple[Tensor, Tensor]:
    """`clone_term` with all tokens alike or, if `relative`, with the weights of `relative_weight`.

    Args:
        mask: bool [batch, sequence], false for tokens to ignore; None: use all.
        triton: whether to use the Triton kernels (`lrc.cloning.kernels.clone`). They take no
            float64, and no target that needs a gradient; these are compared in torch.
    """
    if triton and not target.requires_grad and max(student.itemsize, target.itemsize) <= 4:
        from lrc.cloning.kernels import clone

        return clone.clone_term(student, target, mask, tokens, relative, factors)
    weight = relative_weight(student, target, mask) if relative else mask
    return clone_term(student, target, weight, tokens, factors, reuse_target_buffer)


def clone_term(
    student: Tensor,
    target: Tensor,
    weight: Tensor | None,
    tokens: int,
    factors: tuple[Tensor, Tensor] | None = None,
    reuse_target_buffer: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean squared difference over the elements of the unmasked tokens (paper section 3.2).

    Args:
        student: [batch, sequence, width].
        target: the teacher's side, [batch, sequence, width]; may need a gradient too.
        weight: weight of each token, [batch, sequence], no gradient: a bool mask, or
            `relative_weight`; None: 1 for all tokens.
        tokens: number of tokens to average over.
        factors: a_T [batch, sequence, d_T], no gradient, and P [d_T, width], if the target is their
            product; the target itself must then need no gradient. P gets its gradient. The forward
            pass computes it, so a_T need not be kept until the backward pass.
        reuse_target_buffer: whether the difference may overwrite a target that needs no gradient.

    Returns:
        The student's activation and the loss, a scalar. Let the model continue with the returned
        activation: one pass then adds up the gradients of the loss and of the model.
    """
    scale = 1 / (tokens * student.shape[-1])
    source, projection = factors or (None, None)
    return _SquaredDifference.apply(  # type: ignore[no-untyped-call]
        student, target, projection, source, weight, scale, reuse_target_buffer
    )


def relative_weight(student: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Token weights that make a clone term a relative error: 1 / (m + median of the teacher's m),
    where m is the larger mean square of both sides of a token.

    A few tokens have massive activations, hundreds of times the rest, and dominate the plain mean
    squared difference. With these weights, all tokens and all layers count about the same, and no
    token has an error above 4. With the teacher's side alone, a token at which the student writes
    its massive activation a layer later than the teacher would count ten thousand times. The median
    is over the micro-batch.

    Args:
        student: the student's side, [batch, sequence, width].
        target: the teacher's side, [batch, sequence, width].
        mask: bool [batch, sequence], false for tokens to ignore; None: use all.

    Returns:
        Weights [batch, sequence], zero for masked tokens, at least float32.
    """
    own, mean_square = _mean_square(student), _mean_square(target)
    counted = mean_square if mask is None else mean_square.where(mask, torch.nan)
    # With a dimension, the median is selected without a sort and, on CUDA, without a sync.
    median = counted.flatten().nanmedian(0).values
    size = torch.maximum(mean_square, own) + median
    weight = 1 / size.clamp_min(torch.finfo(size.dtype).tiny)
    return weight if mask is None else weight * mask


def _mean_square(activation: Tensor) -> Tensor:
    """By token, [batch, sequence], at least float32."""
    exact = upcast(activation.detach())
    return torch.linalg.vecdot(exact, exact) / activation.shape[-1]


def projection_unit(weighted: Tensor, source: Tensor, projection: Tensor, scale: float) -> Tensor:
    """The gradient of a projection [d_T, width] whose product with the teacher's side is the
    target, for a loss gradient of 1.

    Args:
        weighted: the differences times the weights of their tokens, [batch, sequence, width].
        source: a_T, [batch, sequence, d_T].
        projection: P, [d_T, width].
        scale: factor of the loss.
    """
    rows = weighted.flatten(0, -2).to(source.dtype)
    return -2 * scale * (source.flatten(0, -2).T @ rows).to(projection.dtype)


class _SquaredDifference(torch.autograd.Function):
    """scale * weighted sum of squared differences. Keeps only the difference for the backward pass,
    and the gradient of the projection if the target comes from one."""

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
        unit = None  # the gradient of the projection for a loss gradient of 1
        if projection is not None and source is not None and ctx.needs_input_grad[2]:
            unit = projection_unit(weighted, source, projection, scale)
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


def naive_clone_term(student: Tensor, target: Tensor, weight: Tensor | None, tokens: int) -> Tensor:
    """The loss of `clone_term`, with all gradients from autograd: its reference in tests."""
    squares = (student - target).square().sum(-1)
    if weight is not None:
        squares = squares * weight
    return squares.sum() / (tokens * student.shape[-1])
