"""`train.token_grad_clip`: keep single tokens from dominating a step.

A token that is close to a massive activation has a gradient hundreds of times as large as others.
If the whole gradient is clipped, little else is left in it. A step of the usual length then gives
this token and similar ones massive activations. No gradient brings them back, because the next norm
removes their size. So this bounds the gradient that each token sends back through a linear map by a
multiple of the median. Not from the paper.
"""

import torch
from torch import Tensor

from lrc.model.precision import upcast_dtype

NORMS = "token_norms"
"""Attribute of a gradient that has just been written: the norms of its tokens, and the tensor's
version then."""


def remember_norms(gradient: Tensor, norms: Tensor) -> None:
    """Attach the norms [batch, sequence] of a new gradient [batch, sequence, width] to it, for
    `clip_tokens`.

    Nothing else may refer to its memory, because it may be clipped in place. If autograd adds
    another gradient to it, the norms are forgotten.
    """
    setattr(gradient, NORMS, (norms, gradient._version))


def known_norms(gradient: Tensor) -> Tensor | None:
    """The norms that `remember_norms` attached, if the gradient has not changed since."""
    norms, version = getattr(gradient, NORMS, (None, None))
    return norms if version == gradient._version else None


def clip_output(output: Tensor, spared: Tensor, limit: float, triton: bool = False) -> None:
    """Clip the gradient at the output of a linear map per token in the backward pass.

    Args:
        output: [batch, sequence, width]. Nothing happens if it needs no gradient.
        spared: tokens not to clip, bool [batch, sequence]: the first tokens of sequences, because
            everything after depends on them.
        limit: as in `clip_tokens`.
        triton: as in `clip_tokens`.
    """
    if output.requires_grad:
        output.register_hook(lambda gradient: clip_tokens(gradient, spared, limit, triton))  # type: ignore[no-untyped-call]


def clip_tokens(gradient: Tensor, spared: Tensor, limit: float, triton: bool = False) -> Tensor:
    """Clip the norm of each token's gradient at `limit` times the median over the tokens with a
    nonzero gradient.

    Args:
        gradient: [batch, sequence, width].
        spared: tokens not to clip, bool [batch, sequence].
        limit: the largest norm, in medians.
        triton: whether to use the Triton kernels, up to float32. They clip a gradient in place if
            its norms are known.
    """
    if triton and gradient.itemsize <= 4:
        from lrc.cloning.kernels import clipping

        return clipping.clip_tokens(gradient, known_norms(gradient), spared, limit)
    norms = torch.linalg.vector_norm(gradient, dim=-1, dtype=upcast_dtype(gradient))
    counted = norms.where(norms > 0, torch.nan)
    # With a dimension, the median is selected without a sort and, on CUDA, without a sync.
    largest = limit * counted.flatten().nanmedian(0).values
    over = (norms > largest) & ~spared
    factors = torch.where(over, largest / norms, 1.0)
    return gradient * factors[..., None].to(gradient.dtype)
