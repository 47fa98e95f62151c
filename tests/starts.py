"""Short calls for the ways to start projections."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrc.cloning.projection import Projections
from lrc.cloning.start import initialize
from lrc.cloning.start.random import random_start
from lrc.recipe.sections import InitializeSection


def initialize_from_text(
    method: Any,
    way: str,
    ids: Tensor,
    progress: Callable[[int, int], None] | None = None,
    refine_epochs: int = 0,
) -> None:
    """Compute a method's projections from calibration tokens."""
    section = InitializeSection.model_validate({"method": way, "refine_epochs": refine_epochs})
    initialize(method, section, ids, progress)


def initialize_random(projections: Projections, std: float, seed: int) -> None:
    """Draw projections from normal(0, std)."""
    section = InitializeSection(method="random", std=std, seed=seed)
    start = random_start(projections, section, torch.empty(0, 0), None)
    with torch.no_grad():
        for key, value in projections.values.items():
            value.copy_(start.projections[key])
