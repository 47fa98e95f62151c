"""Initialization of the projections, one small file per method.

`random` is the paper's. `closed-form` solves the projections from a few thousand tokens of the
training text and starts with a far lower loss (see `lrc.cloning.start.closed_form.solve`). `pca` is
the simple baseline for it, from the same tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrc.cloning.projection import Projections
from lrc.cloning.start.closed_form.solve import solve_projections
from lrc.cloning.start.pca import pca_projections
from lrc.cloning.start.random import initialize_random
from lrc.model.teacher import Teacher
from lrc.recipe.sections import InitializeSection

__all__ = [
    "initialize",
    "initialize_from_text",
    "initialize_random",
    "pca_projections",
    "solve_projections",
]


class Projected(Protocol):
    """The object to initialize: a method whose student is computed from projections."""

    teacher: Teacher
    projections: Projections
    model: PreTrainedModel


def initialize(
    method: Projected,
    section: InitializeSection,
    ids: Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Initialize a method's projections as the recipe says.

    Args:
        method: the method; its projections and gains are set in place.
        section: the recipe's section.
        ids: calibration tokens, int64 [sequences, length]; not used by `random`.
        progress: function that gets the number of completed layers and the total.

    Returns:
        Seconds that the teacher's layers alone take to run once over the tokens; 0 for `random`.
    """
    if section.method == "random":
        initialize_random(method.projections, section.std, section.seed)
        return 0.0
    return initialize_from_text(method, section.method, ids, progress, section.refine_epochs)


def initialize_from_text(
    method: Projected,
    way: str,
    ids: Tensor,
    progress: Callable[[int, int], None] | None = None,
    refine_epochs: int = 0,
) -> float:
    """Solve a method's projections and final gain from calibration tokens, in place.

    Args:
        way: `closed-form` or `pca`; the other arguments and the result are those of `initialize`.
        refine_epochs: as in `lrc.cloning.start.closed_form.solve.solve_projections`; ignored by
            `pca`.

    Raises:
        UserError: if the disk has no room for the calibration's streams.
    """
    projections, teacher = method.projections, method.teacher
    shared_head = "head" not in projections.values
    solve = (
        pca_projections if way == "pca" else partial(solve_projections, refine_epochs=refine_epochs)
    )
    start = solve(teacher, ids, projections.hidden_size, shared_head, progress)
    with torch.no_grad():
        for site in projections.sites:
            value = start.projections[site.projection]
            if site.norm and not site.folded:  # solved for folded gains
                value = teacher.gain(site.norm)[:, None] * value
            projections.values[site.projection].copy_(value)
        final = method.model.get_submodule(teacher.family.final_norm).get_parameter("weight")
        final.copy_(start.final_gain - teacher.family.gain_offset)
    return start.forward_seconds
