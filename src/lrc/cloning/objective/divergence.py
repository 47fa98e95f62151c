"""What a divergence between teacher and student is given, and what it returns."""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from torch import Tensor

LARGEST_EXPM1_ARGUMENT = 20.0
"""Rows whose centered differences of scaled logits go beyond this use sums of logarithms, which are
exact there. All other rows use e^d - 1, which is exact where both distributions nearly agree."""


class Rows(NamedTuple):
    """Some rows of logits."""

    logits: Tensor
    """The student's, s, [n, vocab]. Not to be changed."""
    scaled_teacher: Tensor
    """The teacher's, t / T, [n, vocab]. May be overwritten."""
    temperature: float
    """T."""
    factor: Tensor
    """What the gradient of each row is multiplied by, [n, 1]."""
    beta: float
    """Weight of the teacher in a mixture of both, in (0, 1); only `jsd` has one."""
    buffers: tuple[Tensor, Tensor]
    """Two tensors [n, vocab] that may be overwritten."""


DivergenceFunction = Callable[[Rows], tuple[Tensor, Tensor]]
"""Returns the divergence of each row, [n, 1] in nats, and its gradient by s / T, times the factor,
[n, vocab]."""


def find_divergence(name: str) -> DivergenceFunction:
    """The divergence of a name (one of `lrc.recipe.sections.Divergence`)."""
    function: DivergenceFunction = import_module(f"lrc.cloning.objective.{name}").divergence
    return function


def find_reference(name: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Its naive form, from log-probabilities of teacher and student [n, vocab] and beta."""
    function: Callable[[Tensor, Tensor, float], Tensor] = import_module(
        f"lrc.cloning.objective.{name}"
    ).reference
    return function
