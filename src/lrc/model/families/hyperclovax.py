"""HyperCLOVA X: Granite with a factor of the logits, and mostly a norm after each block."""

from dataclasses import replace
from typing import Any

from lrc.model.families.base import ATTENTION, FFN, Branch
from lrc.model.families.granite import GRANITE

NORMS_AFTER = replace(ATTENTION, after="post_norm1"), replace(FFN, after="post_norm2")


def branches(config: Any, _layer: int) -> tuple[Branch, ...]:
    """The branches of every layer."""
    return NORMS_AFTER if config.use_post_norm else (ATTENTION, FFN)


HYPERCLOVAX = replace(
    GRANITE,
    model_type="hyperclovax",
    gguf=None,
    branches=branches,
    logit_scale=lambda config: config.logits_scaling,
    divides_by_heads=True,
)
