"""The paper's start: every projection drawn from normal(0, std)."""

import torch
from torch import Tensor

from lrc.cloning.projection import Projections
from lrc.cloning.start.basis import StreamStatistics
from lrc.cloning.start.start import Start
from lrc.recipe.sections import InitializeSection
from lrc.system.progress import Progress


def random_start(
    projections: Projections,
    section: InitializeSection,
    ids: Tensor,
    progress: Progress | None,
    statistics: StreamStatistics | None = None,
) -> Start:
    """Draw every projection [d_T, d_S], the same on every device."""
    generator = torch.Generator().manual_seed(section.seed)
    drawn = {
        key: torch.randn(value.shape, generator=generator) * section.std
        for key, value in projections.values.items()
    }
    return Start(drawn, final_gain=None, folded=False)
