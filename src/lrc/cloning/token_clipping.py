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


def clip_output(output: Tensor, spared: Tensor, limit: float) -> None:
    """Clip the gradient at the output of a linear map per token in the backward pass.

    Args:
        output: [batch, sequence, width]. Nothing happens if it needs no gradient.
        spared: tokens not to clip, bool [batch, sequence]: the first tokens of sequences, because
            everything after depends on them.
        limit: as in `clip_tokens`.
    """
    if output.requires_grad:
        output.register_hook(lambda gradient: clip_tokens(gradient, spared, limit))  # type: ignore[no-untyped-call]


def clip_tokens(gradient: Tensor, spared: Tensor, limit: float) -> Tensor:
    """Clip the norm of each token's gradient at `limit` times the median over the tokens with a
    nonzero gradient.

    Args:
        gradient: [batch, sequence, width].
        spared: tokens not to clip, bool [batch, sequence].
        limit: the largest norm, in medians.
    """
    norms = torch.linalg.vector_norm(gradient, dim=-1, dtype=upcast_dtype(gradient))
    counted = norms.where(norms > 0, torch.nan)
    # With a dimension, the median is selected without a sort and, on CUDA, without a sync.
    largest = limit * counted.flatten().nanmedian(0).values
    over = (norms > largest) & ~spared
    factors = torch.where(over, largest / norms, 1.0)
    return gradient * factors[..., None].to(gradient.dtype)
