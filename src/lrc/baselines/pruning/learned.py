"""Masks that are learned under a constraint on how many units stay open.

For each kind of unit, E is the expected share of open units and t is the target's share. The loss
includes `linear * (E - t) + quadratic * (E - t)^2`, the Lagrangian of the constraint E = t. The
masks descend it and the multipliers ascend it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrc.baselines.pruning.hard_concrete import log_alpha_of, open_probability, sample, settled
from lrc.baselines.pruning.masked import MaskValues
from lrc.model.kept_units import KeptUnits
from lrc.model.pruned_shape import PrunedShape

KINDS = ("layers", "hidden", "groups", "neurons")


@dataclass(frozen=True)
class Counted:
    """Units of one kind."""

    shape: tuple[int, ...]
    """Shape of the masks. The constraint is on the last dimension, for each layer separately if
    there are two."""
    kept: int
    """Number of kept units along the last dimension."""


def counted(teacher: PrunedShape, target: PrunedShape) -> dict[str, Counted]:
    """The kinds of which the target has fewer units than the teacher; only these are masked."""
    kinds = {
        "layers": Counted((teacher.layers,), target.layers),
        "hidden": Counted((teacher.hidden,), target.hidden),
        "groups": Counted((teacher.layers, teacher.kv_heads), target.kv_heads),
        "neurons": Counted((teacher.layers, teacher.neurons), target.neurons),
    }
    return {kind: units for kind, units in kinds.items() if units.kept < units.shape[-1]}


class LearnedMasks:
    """Hard-concrete masks with the multipliers of their constraints.

    Args:
        teacher: shape of the masked model.
        target: shape to reach.
        open_at_first: probability that a mask is open before training.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        teacher: PrunedShape,
        target: PrunedShape,
        open_at_first: float,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.teacher, self.units = teacher, counted(teacher, target)
        start = log_alpha_of(open_at_first)
        self.log_alpha: dict[str, nn.Parameter] = {}
        self.linear: dict[str, nn.Parameter] = {}
        self.quadratic: dict[str, nn.Parameter] = {}
        for kind, units in self.units.items():
            full = torch.full(units.shape, start, device=device, dtype=dtype)
            self.log_alpha[kind] = nn.Parameter(full)
            for multipliers in (self.linear, self.quadratic):
                multipliers[kind] = nn.Parameter(full.new_zeros(units.shape[:-1]))

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by name."""
        parts = {"log_alpha": self.log_alpha, "linear": self.linear, "quadratic": self.quadratic}
        return {
            f"masks.{kind}.{part}": of_kind[kind]
            for kind in self.units
            for part, of_kind in parts.items()
        }

    def multipliers(self) -> Iterator[nn.Parameter]:
        """The parameters that ascend."""
        yield from self.linear.values()
        yield from self.quadratic.values()

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The noise of one sample: numbers in (0, 1) by kind, the same on every device."""
        noise = {}
        for kind, log_alpha in self.log_alpha.items():
            uniform = torch.rand(log_alpha.shape, generator=generator, dtype=torch.float64)
            noise[kind] = uniform.clamp_(1e-6, 1 - 1e-6).to(log_alpha)
        return noise

    def values(self, noise: dict[str, Tensor]) -> MaskValues:
        """Masks drawn with this noise, differentiable."""
        return MaskValues(**{k: sample(self.log_alpha[k], noise[k]) for k in self.units})

    def gaps(self, progress: float = 1.0) -> dict[str, Tensor]:
        """E - t by kind: a scalar, or [layers].

        Args:
            progress: how far the target has moved from all units to its final value, in [0, 1].
        """
        return {
            kind: open_probability(self.log_alpha[kind]).mean(-1)
            - (1 - progress * (1 - units.kept / units.shape[-1]))
            for kind, units in self.units.items()
        }

    def lagrangian(self, progress: float = 1.0) -> Tensor:
        """Sum of the constraints' terms over kinds and layers."""
        total = next(iter(self.log_alpha.values())).new_zeros(()) if self.units else torch.zeros(())
        for kind, gap in self.gaps(progress).items():
            term = self.linear[kind] * gap + self.quadratic[kind] * gap.square()
            total = total + term.sum()
        return total

    def kept(self) -> KeptUnits:
        """The units that are most likely open, in the target's shape."""
        whole = self.teacher
        layers = self._highest("layers", whole.layers)[0].tolist()
        groups, neurons = (
            self._highest(kind, number).expand(whole.layers, -1)
            for kind, number in (("groups", whole.kv_heads), ("neurons", whole.neurons))
        )
        return KeptUnits(
            layers,
            self._highest("hidden", whole.hidden)[0],
            [groups[layer] for layer in layers],
            [neurons[layer] for layer in layers],
        )

    def undecided(self) -> dict[str, tuple[int, int]]:
        """By kind: the number of units that their rank decides, and the number of all units. Rank
        decides a unit if its mask without noise is 0 but the unit is kept, or if the mask is not 0
        but the unit is removed."""
        found = {}
        for kind, log_alpha in self.log_alpha.items():
            is_open = settled(log_alpha.detach()).reshape(-1, log_alpha.shape[-1]) > 0
            units = self._highest(kind, log_alpha.shape[-1])
            keep = torch.zeros_like(is_open).scatter(1, units.to(is_open.device), True)
            found[kind] = int((is_open != keep).sum()), keep.numel()
        return found

    def _highest(self, kind: str, number: int) -> Tensor:
        """The kept units among `number` of a kind, ascending: int64 [layers or 1, kept]."""
        if kind not in self.units:
            return torch.arange(number)[None]
        rows = self.log_alpha[kind].detach().reshape(-1, number).cpu()
        # The sort is stable: among equals the first ones are kept, on every device.
        ranked = rows.argsort(dim=-1, descending=True, stable=True)[:, : self.units[kind].kept]
        return ranked.sort(dim=-1).values
