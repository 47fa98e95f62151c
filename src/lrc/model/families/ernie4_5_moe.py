"""ERNIE 4.5 with experts: Llama's attention; in most layers experts, with a shared one."""

from typing import Any

from lrc.model.families.base import ATTENTION, EXPERTS, FFN, Branch, Family
from lrc.model.families.deepseek_v3 import SHARED


def branches(config: Any, layer: int) -> tuple[Branch, Branch]:
    """The branches of a layer."""
    within = config.moe_layer_start_index <= layer <= config.moe_layer_end_index
    if not within or (layer + 1) % config.moe_layer_interval:
        return ATTENTION, FFN
    return ATTENTION, SHARED if config.moe_num_shared_experts else EXPERTS


ERNIE4_5_MOE = Family("ernie4_5_moe", gguf="ernie4_5-moe", branches=branches)
