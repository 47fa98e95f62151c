"""Which heads and FFN neurons to keep: those whose loss costs most in the teacher's predictions.

A writer W [d, n] adds W a to the residual stream. If some inputs are removed and W is solved again
for the others, the squared error in the metric F of the predictions rises, for one unit b, by

    tr V_b ((G^-1)_bb)^-1 V_b^T,    V = F^1/2 W,

where G = E[a a^T]. This is the saliency of optimal brain surgeon (Hassibi and Stork 1993) for a
linear map; a unit that others can stand in for is cheap, however active it is. Units are removed
one by one. After each, G^-1 and V become those of the others:

    G^-1 <- G^-1 - G^-1_b ((G^-1)_bb)^-1 G^-1_b^T,    V <- V - V_b ((G^-1)_bb)^-1 G^-1_b^T.
"""

import torch
from torch import Tensor

from lrc.model.kept_units import spread

ROUNDS = 6
"""Rounds of removal. In a round, only the cheapest units at its start are updated, twice as many as
it removes. This saves nearly all of the time if there are thousands."""

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
    crossed = root_of(metric) @ writer @ gram
    kept = torch.arange(len(gram) // size, device=gram.device)
    surplus = len(kept) - count
    for left in range(ROUNDS, 0, -1):
        removed = surplus // left
        if not removed:
            continue
        surplus -= removed
        inputs = spread(kept, size)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[inputs][:, inputs]))
        solved = crossed[:, inputs] @ inverse
        nearest = unit_costs(inverse, solved, size).argsort(stable=True)[: 2 * removed]
        inside = spread(nearest, size)
        gone = _remove(inverse[inside][:, inside], solved[:, inside], size, removed)
        stays = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
        stays[nearest[gone]] = False
        kept = kept[stays]
    return kept


def root_of(metric: Tensor) -> Tensor:
    """F^1/2 of a symmetric F [d, d]."""
    values, vectors = torch.linalg.eigh(metric)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _remove(inverse: Tensor, weighted: Tensor, size: int, count: int) -> Tensor:
    """The units to remove, one by one, int64 [count]. Arguments are those of `unit_costs`."""
    inverse, weighted = inverse.clone(), weighted.clone()
    left = torch.ones(len(inverse) // size, dtype=torch.bool, device=inverse.device)
    columns = torch.arange(size, device=inverse.device)
    eye = torch.eye(size, dtype=inverse.dtype, device=inverse.device)
    for _ in range(count):  # on a GPU nothing here waits for it
        costs = unit_costs(inverse, weighted, size).where(left, torch.inf)
        unit = costs.argmin(0, keepdim=True)
        own = unit * size + columns
        rows = inverse[own]
        factor = rows / rows[:, own] if size == 1 else torch.linalg.solve_ex(rows[:, own], rows)[0]
        weighted -= weighted[:, own] @ factor
        inverse -= inverse[:, own] @ factor
        left.index_fill_(0, unit, False)
        inverse[own[:, None], own] = eye
    return (~left).nonzero()[:, 0]


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
    return (torch.linalg.solve_ex(blocks, own.mT)[0].mT * own).sum((1, 2))
