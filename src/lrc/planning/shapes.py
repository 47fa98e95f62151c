"""Candidate shapes of a student that all use up one budget."""

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import cache

import torch
from transformers import PreTrainedModel

from lrc.cloning.shape.pruned_teacher import (
    asked_shape,
    first_units,
    has_neurons,
    pruned_teacher,
    prunes,
)
from lrc.model.pruned_shape import PrunedShape, expert_groups, group_size, shape_of_config
from lrc.model.student import EXPERTS_MULTIPLE, derive_config, student_config
from lrc.model.teacher import Teacher
from lrc.recipe.sections import StudentSection
from lrc.system.errors import UserError

STEPS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""Steps of widths, coarsest first. K-quants need 256, q8_0 needs 32."""

TOLERANCE = 0.03
"""How far from the budget a candidate may be, as a share of it."""

ROUNDING = 0.125
"""How far a hidden size may be from its share if neurons make up for the difference."""

SMALLEST_SHARE = 0.25
"""Candidates with less than this share of the teacher's size on an axis rank last."""

Measure = Callable[[PreTrainedModel], float]
"""What the budget is of: a number that grows with every size of a model, without weights."""


@dataclass(frozen=True)
class CostLimit:
    """What a student may cost."""

    measure: Measure
    limit: float
    hard: bool = False
    """Whether no candidate may exceed it. Otherwise it may, by `TOLERANCE`."""

    def allows(self, cost: float) -> bool:
        """Whether a cost uses up the budget."""
        above = 0 if self.hard else TOLERANCE
        return 1 - TOLERANCE <= cost / self.limit <= 1 + above


@dataclass(frozen=True)
class Candidate:
    """A shape, by what is smaller than the teacher's."""

    kind: str
    shape: PrunedShape


KINDS = (
    "experts",
    "hidden-experts",
    "layers-experts",
    "hidden-neurons",
    "hidden-heads-neurons",
    "layers-heads-neurons",
    "heads-neurons",
    "layers-neurons",
    "neurons",
    "layers-hidden",
    "layers",
    "hidden",
)
"""The kinds of shapes, by the axes that shrink, in the order in which they are recommended when
nothing is measured. It is a rule, made from the held-out losses of stories260K, SmolLM2-135M and a
small mixture of experts (docs/shapes.md)."""


def section_of(teacher: Teacher, shape: PrunedShape) -> StudentSection:
    """The recipe's section for a shape. Sizes of the teacher are left out."""
    whole = shape_of_config(teacher.config)
    return StudentSection(
        hidden_size=None if shape.hidden == whole.hidden else shape.hidden,
        intermediate_size=None if shape.neurons == whole.neurons else shape.neurons,
        kv_heads=None if shape.kv_heads == whole.kv_heads else shape.kv_heads,
        layers=None if shape.layers == whole.layers else shape.layers,
        experts=None if shape.experts == whole.experts else shape.experts,
    )


def student_without_weights(teacher: Teacher, shape: PrunedShape) -> PreTrainedModel:
    """The student of a shape, on the meta device."""
    with torch.device("meta"):
        return type(teacher.model)(derive_config(teacher, section_of(teacher, shape)))


def refusal(teacher: Teacher, shape: PrunedShape) -> str | None:
    """Why no student of a shape can be cloned; None: it can."""
    section = section_of(teacher, shape)
    try:
        asked_shape(teacher, section)
        student_config(teacher, section)
        if prunes(teacher, section):
            pruned_teacher(teacher, first_units(teacher, section))
    except UserError as error:
        return str(error)
    return None


def rank(teacher: Teacher, candidate: Candidate) -> tuple[bool, int]:
    """A key that sorts candidates by the rule: first those that keep at least a quarter of every
    axis, then as `KINDS`."""
    sizes = zip(astuple(candidate.shape), astuple(shape_of_config(teacher.config)), strict=True)
    shares = [own / whole for own, whole in sizes if whole]
    return min(shares) < SMALLEST_SHARE, KINDS.index(candidate.kind)


def candidates(teacher: Teacher, budget: CostLimit) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates in the order of the rule, and why the other kinds are left out.

    Args:
        teacher: a teacher, which needs no weights.
        budget: what a student may cost.

    Raises:
        UserError: if the teacher itself costs no more than the budget.
    """
    search = _Search(teacher, budget)
    if budget.limit >= search.cost(search.whole):
        raise UserError(
            "The teacher itself is no larger than this: choose a smaller --params, --ratio or "
            "--memory."
        )
    found: dict[PrunedShape, Candidate] = {}
    missing: dict[str, str] = {}
    for kind in KINDS:
        if search.lacks & set(kind.split("-")):
            continue
        reason: str | None = "no size of it fits the budget"
        for shape in search.shapes(kind):
            reason = refusal(teacher, shape)
            if reason is None:
                found.setdefault(shape, Candidate(kind, shape))
                break
        if reason:
            missing[kind] = reason
    return sorted(found.values(), key=lambda one: rank(teacher, one)), missing


class _Search:
    """Finds sizes that use up a budget, one free axis at a time."""

    def __init__(self, teacher: Teacher, budget: CostLimit) -> None:
        self.teacher, self.budget = teacher, budget
        self.whole = shape_of_config(teacher.config)
        self.cost = cache(lambda shape: budget.measure(student_without_weights(teacher, shape)))
        self.share = budget.limit / self.cost(self.whole)
        branches = [branch for every in teacher.layout.branches for branch in every]
        units = {"neurons": has_neurons, "experts": lambda branch: branch.has_experts}
        self.lacks = {name for name, found in units.items() if not any(map(found, branches))}
        """Axes that no layer has."""

    def shapes(self, kind: str) -> Iterator[PrunedShape]:
        """The shapes of a kind, the best first; none if no size fits.

        Several axes shrink by about equal shares: with r, the share of the teacher that remains,
        hidden size and layers to (1 + r) / 2, and key/value heads to r. The last axis makes up the
        difference.
        """
        *fixed, free = kind.split("-")
        for base in self._bases(fixed):
            if free in ("neurons", "experts"):
                yield from self._units(base, free)
            elif free == "hidden":
                yield from self._fit(base, "hidden", self._multiple(base.kv_heads))
            else:
                yield from self._layers(base)

    def _bases(self, fixed: list[str]) -> Iterator[PrunedShape]:
        """The teacher's shape with some axes smaller, for several numbers of heads."""
        whole, half = self.whole, (1 + self.share) / 2
        layers = max(1, round(whole.layers * half)) if "layers" in fixed else whole.layers
        if "layers" in fixed and layers == whole.layers:
            return
        heads = [whole.kv_heads]
        if "heads" in fixed:
            wanted = whole.kv_heads * self.share
            heads = sorted(range(whole.kv_heads - 1, 0, -1), key=lambda n: abs(n - wanted))
        for number in heads:
            hidden = whole.hidden
            if "hidden" in fixed:
                hidden = self._near(hidden * half, number)
            yield PrunedShape(layers, hidden, number, whole.neurons, whole.experts)

    def _near(self, size: float, kv_heads: int) -> int:
        """The hidden size near another one."""
        allowed = self.teacher.family.hidden_sizes(self.teacher.config)
        if allowed is not None:
            return min(allowed, key=lambda one: (one == self.whole.hidden, abs(one - size)))
        return rounded(size, self._multiple(kv_heads), self.whole.hidden)

    def _multiple(self, kv_heads: int) -> int:
        """What the hidden size must be a multiple of."""
        base = 2
        if self.teacher.family.divides_by_heads:
            base = math.lcm(base, kv_heads * group_size(self.teacher.config))
        if self.teacher.layout.has_experts:
            base = math.lcm(base, EXPERTS_MULTIPLE)
        return base

    def _layers(self, base: PrunedShape) -> Iterator[PrunedShape]:
        """Fewer layers. If no whole number of them fits, the next larger one, and fewer neurons or
        experts."""
        yield from self._fit(base, "layers", 1, [1])
        above = self._largest(base, "layers", 1) + 1
        if above <= base.layers:
            rest = "experts" if "neurons" in self.lacks else "neurons"
            yield from self._units(replace(base, layers=above), rest)

    def _units(self, base: PrunedShape, axis: str) -> Iterator[PrunedShape]:
        """Fewer neurons, or fewer experts, as many in each of the router's groups."""
        groups = expert_groups(self.teacher.config) if axis == "experts" else 1
        yield from self._fit(base, axis, groups)

    def _fit(
        self, base: PrunedShape, axis: str, multiple: int, among: list[int] | None = None
    ) -> Iterator[PrunedShape]:
        """The shape whose size on an axis is a multiple of the coarsest possible step."""
        for step in among or steps(multiple):
            below = self._largest(base, axis, step)
            for size in (below, below + step):
                if 0 < size <= getattr(base, axis):
                    shape = replace(base, **{axis: size})
                    if self.budget.allows(self.cost(shape)):
                        yield shape
                        return

    def _largest(self, base: PrunedShape, axis: str, step: int) -> int:
        """The largest multiple of a step within the budget; 0: none. Costs that are not quite
        monotonic (K-quants) may hide a larger one."""
        low, high = 0, getattr(base, axis) // step + 1
        while high - low > 1:
            middle = (low + high) // 2
            shape = replace(base, **{axis: middle * step})
            low, high = (middle, high) if self.cost(shape) <= self.budget.limit else (low, middle)
        return low * step


def steps(multiple: int) -> list[int]:
    """The steps of a size that must be a multiple of a number, coarsest first."""
    return sorted({math.lcm(step, multiple) for step in STEPS}, reverse=True)


def rounded(size: float, multiple: int, limit: int) -> int:
    """A size below a limit and near another one: a multiple of the coarsest step that stays within
    `ROUNDING`."""
    for step in steps(multiple):
        near = round(size / step) * step
        if 0 < near < limit and abs(near / size - 1) <= ROUNDING:
            return near
    return multiple
