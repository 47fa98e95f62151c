"""The paper's start: every projection drawn from normal(0, std)."""

import torch

from lrc.cloning.projection import Projections


def initialize_random(projections: Projections, std: float, seed: int) -> None:
    """Draw every projection [d_T, d_S] from normal(0, std), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in projections.values.values():
            value.copy_(torch.randn(value.shape, generator=generator) * std)
