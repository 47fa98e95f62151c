"""The interface of the divergences between teacher and student."""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from torch import Tensor

LARGEST_EXPM1_ARGUMENT = 20.0
"""Rows with larger centered differences of scaled logits use sums of logarithms, which are exact
there. All other rows use e^d - 1, which is exact when both distributions nearly agree."""


class Rows(NamedTuple):
    """A block of rows of logits, with everything that a divergence needs."""

    logits: Tensor
    """The student's, s, [n, vocab]. Must not be changed."""
    scaled_teacher: Tensor
    """The teacher's, t / T, [n, vocab]. May be overwritten."""
    temperature: float
    """T."""
    factor: Tensor
    """Factor for the gradient of each row, [n, 1]."""
    beta: float
    """Weight of the teacher in the mixture of both, in (0, 1); only `jsd` uses it."""
    buffers: tuple[Tensor, Tensor]
    """Two tensors [n, vocab] that may be overwritten."""


def answers_at_once(tensor: Tensor) -> bool:
    """Whether the CPU can read a tensor's values without waiting for a GPU."""
    return tensor.device.type == "cpu"


DivergenceFunction = Callable[[Rows], tuple[Tensor, Tensor]]
"""Returns the divergence of each row in nats, [n, 1], and its gradient with respect to s / T, times
the factor, [n, vocab]."""


def find_divergence(name: str) -> DivergenceFunction:
    """The divergence with a name (one of `lrc.recipe.sections.Divergence`)."""
    function: DivergenceFunction = import_module(f"lrc.cloning.objective.{name}").divergence
    return function


def find_reference(name: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Its naive form, from log-probabilities of teacher and student [n, vocab] and beta."""
    function: Callable[[Tensor, Tensor, float], Tensor] = import_module(
        f"lrc.cloning.objective.{name}"
    ).reference
    return function
