"""How the projections start, one small file each.

`random` is the paper's. `closed-form` solves the projections from a few thousand tokens of the
training text and starts with a far lower loss (`lrc.cloning.start.closed_form.solve`). `pca` is the
simple baseline for it, from the same tokens.

To add a start, write a file with a function like `random_start`, and add its line to `STARTS` and
its name to `InitializeSection.method` in `lrc.recipe.sections`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrc.cloning.method import StartReport
from lrc.cloning.projection import Projections
from lrc.cloning.start.basis import StreamStatistics
from lrc.cloning.start.closed_form.solve import closed_form_start
from lrc.cloning.start.pca import pca_start
from lrc.cloning.start.random import random_start
from lrc.cloning.start.start import Start
from lrc.model.teacher import Teacher
from lrc.recipe.sections import InitializeSection
from lrc.system.progress import Progress

__all__ = ["STARTS", "initialize"]


@dataclass(frozen=True)
class StartMethod:
    """A way to start."""

    solve: Callable[
        [Projections, InitializeSection, Tensor, Progress | None, StreamStatistics | None], Start
    ]
    """Returns the start, given the projections that it is for and the other arguments of
    `initialize`."""

    reads_text: bool = True
    """Whether it needs calibration tokens."""


STARTS = {
    "closed-form": StartMethod(closed_form_start),
    "pca": StartMethod(pca_start),
    "random": StartMethod(random_start, reads_text=False),
}
"""Every start by its name in a recipe."""


class Projected(Protocol):
    """The object to initialize: a method whose student is computed from projections."""

    teacher: Teacher
    projections: Projections
    model: PreTrainedModel


def initialize(
    method: Projected,
    section: InitializeSection,
    ids: Tensor,
    progress: Progress | None = None,
    statistics: StreamStatistics | None = None,
) -> StartReport:
    """Initialize a method's projections and its final gain as the recipe says, in place.

    Args:
        method: the method.
        section: the recipe's section.
        ids: calibration tokens, int64 [sequences, length]; not used by `random`.
        progress: gets the number of completed parts and their total.
        statistics: those of the teacher's stream over these tokens, if `prune` has collected them.

    Raises:
        UserError: if the disk has no room for the calibration's streams.
    """
    projections, teacher = method.projections, method.teacher
    start = STARTS[section.method].solve(projections, section, ids, progress, statistics)
    with torch.no_grad():
        for weight in projections.weights:
            value = start.projections[weight.projection]
            if start.folded and weight.norm and not weight.folded:
                value = teacher.gain(weight.norm, value.dtype)[:, None] * value
            projections.values[weight.projection].copy_(value)
        gains = dict(start.gains)
        if start.final_gain is not None:
            gains[teacher.family.final_norm] = start.final_gain
        for norm, gain in gains.items():
            weight = method.model.get_submodule(norm).get_parameter("weight")
            weight.copy_(gain - teacher.family.gain_offset)
    return StartReport(start.forward_seconds)
