"""How the projections start: one small file a way.

`random` is the paper's. `closed-form` solves them from a few thousand tokens of the training text
and starts far ahead (see `lrc.cloning.start.closed_form.solve`); `pca` is the plain start from the
same tokens that it is measured against.
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
    """What is initialized: a method whose student comes out of projections."""

    teacher: Teacher
    projections: Projections
    model: PreTrainedModel


def initialize(
    method: Projected,
    section: InitializeSection,
    ids: Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Start a method's projections in the way that the recipe names.

    Args:
        method: the method; its projections and gains are set in place.
        section: the recipe's section.
        ids: calibration tokens, int64 [sequences, length]; `random` takes none of them.
        progress: called with the layers done and their number.

    Returns:
        Seconds in which the teacher's layers alone ran once over the tokens; 0 for `random`.
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
    """Set a method's projections and final gain to what calibration tokens give, in place.

    Args:
        way: `closed-form` or `pca`; the others, and what is returned, are those of `initialize`.
        refine_epochs: as in `lrc.cloning.start.closed_form.solve.solve_projections`; nothing for
        `pca`.

    Raises:
        UserError: the disk has no room for the calibration's streams.
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
