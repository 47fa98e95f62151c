"""`train.token_grad_clip`: no single token rules a step.

A token on the brink of a massive activation has a gradient hundreds of times as large as others:
clipping the whole gradient then leaves that token alone, and a step as long as any other throws it,
and those like it, across the brink, from where no gradient brings them back, since the norm that
follows takes their size away. So what each token sends back through a linear map is bounded by a
multiple of the median. Not from the paper.
"""

import torch
from torch import Tensor

from lrc.model.precision import upcast_dtype


def clip_output(output: Tensor, spared: Tensor, limit: float) -> None:
    """Let the backward pass clip the gradient at an output of a linear map, token by token.

    Args:
        output: [batch, sequence, width]. Without a gradient nothing happens.
        spared: tokens that are not clipped, bool [batch, sequence]: the first ones of sequences,
            since everything that follows rests on them.
        limit: as in `clip_tokens`.
    """
    if output.requires_grad:
        output.register_hook(lambda gradient: clip_tokens(gradient, spared, limit))  # type: ignore[no-untyped-call]


def clip_tokens(gradient: Tensor, spared: Tensor, limit: float) -> Tensor:
    """A gradient whose tokens' norms are at most `limit` times their median, over the tokens that
    have one.

    Args:
        gradient: [batch, sequence, width].
        spared: tokens that are left as they are, bool [batch, sequence].
        limit: in medians.
    """
    norms = torch.linalg.vector_norm(gradient, dim=-1, dtype=upcast_dtype(gradient))
    largest = limit * norms.where(norms > 0, torch.nan).nanmedian()
    over = (norms > largest) & ~spared
    factors = torch.where(over, largest / norms, 1.0)
    return gradient * factors[..., None].to(gradient.dtype)
