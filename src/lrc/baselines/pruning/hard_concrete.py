"""Hard-concrete masks: random numbers in [0, 1] that are exactly 0 or 1 with positive probability.

Source: Louizos, Welling and Kingma, Learning Sparse Neural Networks through L0 Regularization
(arXiv 1712.01312), equations 9 to 13, with their constants. All functions work element by element
in the precision of their input.
"""

import math

import torch
from torch import Tensor

LOWEST, HIGHEST = -0.1, 1.1
"""gamma and zeta: the ends of the interval that a concrete variable is stretched to before it is
clamped to [0, 1]."""

TEMPERATURE = 2 / 3
"""beta of the concrete distribution."""


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Draw masks by inverting the distribution function, differentiable in `log_alpha`.

    Args:
        log_alpha: location of each mask.
        uniform: random numbers in (0, 1) of the same shape.
    """
    noise = uniform.log() - (-uniform).log1p()
    return _stretched((log_alpha + noise) / TEMPERATURE)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Probability that a mask is not 0; the sum of these probabilities is the expected L0 norm."""
    return (log_alpha - TEMPERATURE * math.log(-LOWEST / HIGHEST)).sigmoid()


def log_alpha_of(probability: float) -> float:
    """The location at which a mask is open with this probability."""
    return math.log(probability / (1 - probability)) + TEMPERATURE * math.log(-LOWEST / HIGHEST)


def settled(log_alpha: Tensor) -> Tensor:
    """The mask without noise, which the paper uses after training."""
    return _stretched(log_alpha)


def _stretched(logits: Tensor) -> Tensor:
    return torch.clamp(logits.sigmoid() * (HIGHEST - LOWEST) + LOWEST, 0, 1)
