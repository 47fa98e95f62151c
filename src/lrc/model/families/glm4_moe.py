"""GLM 4.5 and later: Llama's attention, a few dense layers, then experts with a shared one."""

from typing import Any

from lrc.model.families.base import ATTENTION, FFN, Branch, Family
from lrc.model.families.deepseek_v3 import SHARED


def branches(config: Any, layer: int) -> tuple[Branch, ...]:
    """The branches of a layer."""
    return ATTENTION, FFN if layer < config.first_k_dense_replace else SHARED


GLM4_MOE = Family("glm4_moe", branches=branches)
