"""`train.token_grad_clip`: no single token rules a step.

A token on the brink of a massive activation has a gradient hundreds of times as large as others:
clipping the whole gradient then leaves that token alone, and a step as long as any other throws it,
and those like it, across the brink, from where no gradient brings them back, since the norm that
follows takes their size away. So what each token sends back through a linear map is bounded by a
multiple of the median. Not from the paper.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrc.cloning.activations import LinearSite, observe
from lrc.data.batch import Batch
from lrc.model.families import LINEARS, Family
from lrc.model.precision import upcast_dtype


def clipped_tokens(
    model: PreTrainedModel, family: Family, batch: Batch, limit: float
) -> AbstractContextManager[None]:
    """While the context is open, let forward passes of a batch clip the gradients of their backward
    pass token by token, at the outputs of all linear maps of the decoder layers.

    Args:
        model: the student.
        family: where its parts live.
        batch: what it runs on. First tokens are spared: what follows in a sequence rests on them.
        limit: as in `clip_tokens`; 0 clips nothing.
    """
    if not limit:
        return nullcontext()
    spared = batch.first_tokens()

    def attend(_place: LinearSite, _input: Tensor, output: Tensor) -> Tensor:
        if output.requires_grad:
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: clip_tokens(gradient, spared, limit)
            )
        return output

    layers = range(model.config.num_hidden_layers)
    places = [(layer, name) for layer in layers for name in LINEARS]
    return observe(model, family, places, attend)


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
