"""Which experts to keep: those whose outputs weigh most in the teacher's predictions.

A layer adds sum_j g_j f_j(x) over the experts j that the router chooses for a token. Without expert
j, to first order, the loss rises by the square of what it adds in the metric F of the predictions,

    sum over its tokens of |F^1/2 g_j f_j(x)|^2.

So an expert costs much if it is used often, or if what it says matters. REAP (Lasby et al. 2025)
ranks by the mean of g_j |f_j(x)| over the tokens of an expert.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lrc.cloning.shape.units import root_of
from lrc.cloning.start.calibration import Block

Read = tuple[Tensor, Tensor]
"""What a block reads, [b, length, d], and the weights of the tokens' errors, [b, length, 1]."""


def choose_experts(costs: Tensor, count: int, groups: int) -> Tensor:
    """The experts to keep, int64 [count], ascending: as many of each group.

    Args:
        costs: what the loss of each expert costs, [experts].
        count: number of experts to keep, a multiple of `groups`.
        groups: number of groups of equal size that the router chooses among first.
    """
    size = len(costs) // groups
    order = costs.view(groups, size).argsort(stable=True, dim=1, descending=True)
    first = size * torch.arange(groups, device=costs.device)
    return (order[:, : count // groups] + first[:, None]).flatten().sort()[0]


def expert_costs(block: Block, experts: nn.Module, reads: Iterator[Read], metric: Tensor) -> Tensor:
    """What the loss of each expert alone costs, float64 [experts].

    Args:
        block: the block with the experts.
        experts: the module that adds up the outputs of the experts, inside the block.
        reads: batches of what the block reads.
        metric: F [d, d], float64.
    """
    root = root_of(metric)
    costs = root.new_zeros(number_of(experts))
    for chosen, added, weights in contributions(block, experts, reads):
        error = (weights * added) @ root.to(added.dtype)
        costs.index_add_(0, chosen, error.square().sum(1).to(costs.dtype))
    return costs


def number_of(experts: nn.Module) -> int:
    """The number of experts in a module that adds up their outputs."""
    return len(next(experts.parameters()))


def contributions(
    block: Block, experts: nn.Module, reads: Iterator[Read]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each batch, and each of the experts that a token uses: their indices [tokens], what they
    add [tokens, d], and the weights of the tokens' errors [tokens, 1].

    Arguments are those of `expert_costs`.
    """
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    for states, weights in reads:
        hook = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
        try:
            block(states)
        finally:
            hook.remove()
        flat, chosen, scores = calls.pop()
        for one in range(chosen.shape[1]):
            added = experts(flat, chosen[:, one, None], scores[:, one, None])
            yield chosen[:, one], added, weights.view(-1, 1)
