"""Which heads and FFN neurons to keep: those whose loss costs most in the teacher's predictions.

A writer W [d, n] adds W a to the residual stream. If some inputs are removed and W is solved again
for the others, the squared error in the metric F of the predictions rises, for one unit b, by

    tr V_b ((G^-1)_bb)^-1 V_b^T,    V = F^1/2 W,

where G = E[a a^T]. This is the saliency of optimal brain surgeon (Hassibi and Stork 1993) for a
linear map; a unit that others can stand in for is cheap, however active it is. The cheapest units
are removed in a few rounds, each with the writer solved again for what is left.
"""

import torch
from torch import Tensor

ROUNDS = 6
"""Rounds of removal. One round at once would remove units that stand in for each other."""

RIDGE = 1e-3
"""Added to the second moment of the inputs, in units of their mean square."""


def choose_units(gram: Tensor, writer: Tensor, metric: Tensor, size: int, count: int) -> Tensor:
    """The units to keep, int64 [count], ascending.

    Args:
        gram: G, the second moment of the writer's inputs, [n, n], float64; n is a multiple of
            `size`, and the inputs of a unit are next to each other.
        writer: W [d, n], float64.
        metric: F [d, d], float64.
        size: number of inputs of a unit.
        count: number of units to keep.
    """
    energy = gram.diagonal()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    gram = gram + RIDGE * energy.mean().clamp_min(1e-30) * eye
    values, vectors = torch.linalg.eigh(metric)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    weighted = root @ writer
    kept = torch.arange(len(gram) // size, device=gram.device)
    surplus = len(kept) - count
    for number in range(ROUNDS, 0, -1):
        removed = surplus // number
        surplus -= removed
        if not removed:
            continue
        inputs = inputs_of(kept, size)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[inputs][:, inputs]))
        solved = weighted @ gram[:, inputs] @ inverse
        costs = unit_costs(inverse, solved, size)
        kept = (
            kept[costs.argsort(descending=True, stable=True)[: len(kept) - removed]].sort().values
        )
    return kept


def unit_costs(inverse: Tensor, weighted: Tensor, size: int) -> Tensor:
    """What the loss of each unit alone costs, [units].

    Args:
        inverse: G^-1 [n, n].
        weighted: V [d, n].
        size: number of inputs of a unit.
    """
    units = len(inverse) // size
    if size == 1:
        return weighted.square().sum(0) / inverse.diagonal()
    blocks = inverse.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    own = weighted.view(-1, units, size).transpose(0, 1)
    return (torch.linalg.solve(blocks, own.mT).mT * own).sum((1, 2))


def inputs_of(units: Tensor, size: int) -> Tensor:
    """The writer's inputs of some units, int64 [units * size]."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()
