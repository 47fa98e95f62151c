"""FLOPs of a training step, as torch counts them."""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from lrc.cloning.low_rank_clone import LowRankClone
from lrc.data.batch import Batch
from lrc.train.batches import count

IN_PLACE = {torch.ops.aten.addmm_: lambda *shapes, out_val=None, **_: addmm_flop(*shapes)}
"""An operation that torch does not count by default."""


def counted_products(method: LowRankClone, batches: Sequence[Batch], step: int) -> float:
    """FLOPs of the matrix products of a step."""
    counts = count(batches)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        method.begin_step(step)
        for batch in batches:
            method.losses(batch, counts).loss.backward()
        method.end_step()
    return sum(
        flops
        for operator, flops in counter.get_flop_counts()["Global"].items()
        if str(operator).startswith(("aten.mm", "aten.addmm"))
    )
