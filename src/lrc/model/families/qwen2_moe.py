"""Qwen1.5 and Qwen2 with experts: Qwen2's attention, and experts with a weighted shared one."""

from typing import Any

from lrc.model.families.base import ATTENTION, FFN, Branch, Family
from lrc.model.families.qwen3_5_moe import SHARED
from lrc.model.families.qwen3_moe import is_dense


def branches(config: Any, layer: int) -> tuple[Branch, Branch]:
    """The branches of a layer."""
    return ATTENTION, FFN if is_dense(config, layer) else SHARED


QWEN2_MOE = Family("qwen2_moe", branches=branches)
