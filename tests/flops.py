"""FLOPs of models and training steps, as torch counts them."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, mm_flop

from lrc.cloning.low_rank_clone import LowRankClone
from lrc.data.batch import Batch
from lrc.train.batches import count

Shape = Sequence[int]


def solved(system: Shape, right: Shape, *_: Any, **__: Any) -> int:
    """A triangular system is solved as if by its inverse."""
    return 2 * prod(right) * system[-1]


def convolved(tokens: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """A short convolution of every channel, without what it computes beyond the sequence."""
    return 2 * tokens[0] * tokens[-1] * prod(weight)


def convolved_backward(
    _gradient: Shape, tokens: Shape, weight: Shape, *rest: Any, **__: Any
) -> int:
    """As often as the forward pass for the input, and for the weight where it is trained."""
    wanted = rest[-1]
    return sum(wanted[:2]) * convolved(tokens, weight)


OTHERS = {
    torch.ops.aten.addmm_: lambda *shapes, out_val=None, **_: addmm_flop(*shapes),
    torch.ops.aten.mv: lambda a, b, **_: mm_flop(a, [*b, 1]),
    torch.ops.aten.linalg_solve_triangular: solved,
    torch.ops.aten.convolution: convolved,
    torch.ops.aten.convolution_backward: convolved_backward,
}
"""Operations that torch does not count by default, or otherwise."""


def counted_flops(run: Callable[[], object]) -> float:
    """FLOPs of what a function runs, but for the angles of rotary embeddings."""
    with FlopCounterMode(display=False, custom_mapping=OTHERS) as counter:
        run()
    found = counter.get_flop_counts()
    angles = [sum(f.values()) for module, f in found.items() if module.endswith("rotary_emb")]
    return sum(found["Global"].values()) - sum(angles)


def counted_step(method: LowRankClone, batches: Sequence[Batch], step: int) -> float:
    """FLOPs of a training step."""
    counts = count(batches)

    def run() -> None:
        method.begin_step(step)
        for batch in batches:
            method.losses(batch, counts).loss.backward()
        method.end_step()

    return counted_flops(run)
