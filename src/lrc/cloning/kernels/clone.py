"""The clone term and the clipping of its tokens' gradients, in Triton kernels.

A program has one token. Memory traffic in bytes an element, with elements of b bytes:

* forward: read the student's and the teacher's side, write their difference: 3 b. The sums of
  squares by token give the loss and the weights, so the elements are not weighted.
* backward: read the difference and the model's gradient, write their sum: 3 b. Norms by token come
  with it, so that clipping (`lrc.cloning.token_clipping`) touches only tokens over the limit.

That is 6 b, or 12 with bfloat16. A target that is a product with a projection costs a pass more,
for the projection's gradient. Arithmetic is float32; the difference is rounded to the wider of the
two element types.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrc.cloning.objective.clone import projection_unit, weight_of_size
from lrc.cloning.token_clipping import remember_norms

BLOCK = 4096
"""Largest number of elements of a token that a program holds at once."""


def clone_term(
    student: Tensor,
    target: Tensor,
    mask: Tensor | None,
    tokens: int,
    relative: bool,
    factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`lrc.cloning.objective.clone_term`, including the weights of `relative_weight`.

    Args:
        student: [batch, sequence, width], up to float32.
        target: the teacher's side, [batch, sequence, width], up to float32; gets no gradient.
        mask: bool [batch, sequence], false for tokens to ignore; None: use all.
        tokens: number of tokens to average over.
        relative: whether tokens are weighted by `relative_weight`.
        factors: as in `lrc.cloning.objective.clone_term`.

    Returns:
        As `lrc.cloning.objective.clone_term`.
    """
    source, projection = factors or (None, None)
    return _Clone.apply(
        student, target, projection, source, mask, 1 / (tokens * student.shape[-1]), relative
    )


class _Clone(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        target: Tensor,
        projection: Tensor | None,
        source: Tensor | None,
        mask: Tensor | None,
        scale: float,
        relative: bool,
    ) -> tuple[Tensor, Tensor]:
        width = student.shape[-1]
        s, t = student.contiguous(), target.contiguous()
        wider = torch.promote_types(s.dtype, t.dtype)
        difference = torch.empty(s.shape, dtype=wider, device=s.device)
        sums = torch.empty(2, *s.shape[:-1], dtype=torch.float32, device=s.device)
        squares, sizes = sums  # of the difference and of the target, by token
        _launch(_clone_forward, s, t, difference, squares, sizes)
        weight = weight_of_size(sizes / width, mask) if relative else mask
        unit = None  # the gradient of the projection for a loss gradient of 1
        if projection is not None and source is not None and ctx.needs_input_grad[2]:
            weighted = difference if weight is None else difference * weight[..., None]
            unit = projection_unit(weighted, source, projection, scale)
        ctx.save_for_backward(difference, weight, unit)
        ctx.scale = scale
        loss = scale * (squares if weight is None else squares * weight).sum()
        return student.view_as(student), loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_student: Tensor, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        difference, weight, unit = ctx.saved_tensors
        grad = None
        if ctx.needs_input_grad[0]:
            factor = 2 * ctx.scale * grad_loss.float()
            by_token = factor.expand(difference.shape[:-1]) if weight is None else factor * weight
            received = grad_student.contiguous()
            grad = torch.empty_like(received)
            norms = torch.empty(grad.shape[:-1], dtype=torch.float32, device=grad.device)
            _launch(_clone_backward, received, difference, grad, by_token.contiguous(), norms)
            remember_norms(grad, norms)
        grad_projection = None if unit is None else unit * grad_loss
        return grad, None, grad_projection, None, None, None, None


def scale_tokens(gradient: Tensor, factors: Tensor) -> Tensor:
    """Multiply the tokens of a contiguous gradient [batch, sequence, width] in place by factors
    [batch, sequence], and return it. Tokens with factor 1 cost nothing."""
    _launch(_scale_tokens, gradient, factors.contiguous())
    return gradient


def _launch(kernel: Any, *tensors: Tensor) -> None:
    """Run a kernel with a program for every token of the first tensor."""
    width = tensors[0].shape[-1]
    block = min(BLOCK, triton.next_power_of_2(width))
    if tensors[0].numel():
        programs = (tensors[0].numel() // width,)
        with torch.cuda.device_of(tensors[0]):
            kernel[programs](*tensors, width, BLOCK=block, num_warps=8 if block > 2048 else 4)


@triton.jit
def _clone_forward(student, target, difference, squares, sizes, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    square = 0.0
    size = 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        at = token * width + columns
        s = tl.load(student + at, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(target + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(difference + at, s - t, mask=inside)
        square += tl.sum((s - t) * (s - t), 0)
        size += tl.sum(t * t, 0)
    tl.store(squares + token, square)
    tl.store(sizes + token, size)


@triton.jit
def _clone_backward(received, difference, gradient, factors, norms, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + token)
    square = 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        at = token * width + columns
        d = tl.load(difference + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(received + at, mask=inside, other=0.0).to(tl.float32) + factor * d
        tl.store(gradient + at, g, mask=inside)
        square += tl.sum(g * g, 0)
    tl.store(norms + token, tl.sqrt(square))


@triton.jit
def _scale_tokens(gradient, factors, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + token)
    if factor != 1.0:
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            at = gradient + token * width + columns
            tl.store(at, tl.load(at, mask=inside, other=0.0).to(tl.float32) * factor, mask=inside)
