"""The clone term in Triton kernels.

A program has one token. Memory traffic in bytes an element, with elements of b bytes:

* forward: read the student's and the teacher's side, write their difference: 3 b. The sums of
  squares by token give the loss and the weights, so the elements are not weighted.
* backward: read the difference and the model's gradient, write their sum: 3 b. Norms by token come
  with it, so that clipping (`lrc.cloning.kernels.clipping`) touches only tokens over the limit.

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

from lrc.cloning.kernels.clipping import by_token, load_counted, median, over_tokens
from lrc.cloning.objective.clone import projection_unit
from lrc.cloning.token_clipping import remember_norms


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
        sums = torch.empty(3, *s.shape[:-1], dtype=torch.float32, device=s.device)
        squares, sizes, larger = sums  # by token: difference, target, larger of both sides
        by_token(_clone_forward, s, t, difference, squares, sizes, larger)
        weight, loss = torch.empty_like(squares), squares.new_empty(())
        over_tokens(
            _weights_and_loss,
            squares,
            sizes,
            larger,
            squares if mask is None else mask.contiguous(),
            weight,
            loss,
            width=float(width),
            scale=scale,
            RELATIVE=relative,
            MASKED=mask is not None,
        )
        unit = None  # the gradient of the projection for a loss gradient of 1
        if projection is not None and source is not None and ctx.needs_input_grad[2]:
            unit = projection_unit(difference * weight[..., None], source, projection, scale)
        ctx.save_for_backward(difference, weight, unit)
        ctx.scale = scale
        return student.view_as(student), loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_student: Tensor, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        difference, weight, unit = ctx.saved_tensors
        grad = None
        if ctx.needs_input_grad[0]:
            received = grad_student.contiguous()
            grad = torch.empty_like(received)
            norms = torch.empty(grad.shape[:-1], dtype=torch.float32, device=grad.device)
            tensors = received, difference, grad, weight, grad_loss.float(), norms
            by_token(_clone_backward, *tensors, scale=2 * ctx.scale)
            remember_norms(grad, norms)
        grad_projection = None if unit is None else unit * grad_loss
        return grad, None, grad_projection, None, None, None, None


@triton.jit
def _clone_forward(student, target, difference, squares, sizes, larger, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    square = 0.0
    size = 0.0
    own = 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        at = token * width + columns
        s = tl.load(student + at, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(target + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(difference + at, s - t, mask=inside)
        square += tl.sum((s - t) * (s - t), 0)
        size += tl.sum(t * t, 0)
        own += tl.sum(s * s, 0)
    tl.store(squares + token, square)
    tl.store(sizes + token, size)
    tl.store(larger + token, tl.maximum(size, own))


@triton.jit
def _weights_and_loss(
    squares,
    sizes,
    larger,
    mask,
    weight,
    loss,
    tokens,
    width,
    scale,
    RELATIVE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`relative_weight` and the loss, from the sums of squares by token."""
    middle = 0.0
    if RELATIVE:
        middle = median(sizes, mask, tokens, width, False, MASKED, BLOCK)
    total = 0.0
    for start in range(0, tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < tokens
        size, _ = load_counted(larger, mask, at, tokens, width, False, False)
        w = tl.where(inside, 1.0, 0.0)
        if RELATIVE:
            sum_of_both = size + middle
            w = 1 / tl.where(
                sum_of_both < 1.1754943508222875e-38, 1.1754943508222875e-38, sum_of_both
            )
        if MASKED:
            w = w * tl.load(mask + at, mask=inside, other=0).to(tl.float32)
        square = tl.load(squares + at, mask=inside, other=0.0)
        tl.store(weight + at, w, mask=inside)
        total += tl.sum(tl.where(inside, square * w, 0.0), 0)
    tl.store(loss, scale * total)


@triton.jit
def _clone_backward(
    received,
    difference,
    gradient,
    weight,
    grad_loss,
    norms,
    width,
    scale,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    factor = scale * tl.load(grad_loss) * tl.load(weight + token)
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
