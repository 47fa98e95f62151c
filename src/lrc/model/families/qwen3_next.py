"""Qwen3-Next: as Qwen3.5 with experts, with other matrices in the delta net."""

from dataclasses import replace
from typing import Any

from lrc.model.families.base import ATTENTION, FFN, Branch, is_linear
from lrc.model.families.qwen3_5 import DELTA_NET
from lrc.model.families.qwen3_5_moe import QWEN3_5_MOE, SHARED
from lrc.model.families.qwen3_moe import is_dense

FUSED_DELTA_NET = replace(
    DELTA_NET,
    readers={name: f"linear_attn.in_proj_{name}" for name in ("qkvz", "ba")},
)


def branches(config: Any, layer: int) -> tuple[Branch, ...]:
    """The branches of a layer."""
    mixer = FUSED_DELTA_NET if is_linear(config, layer) else ATTENTION
    return mixer, FFN if is_dense(config, layer) else SHARED


QWEN3_NEXT = replace(QWEN3_5_MOE, model_type="qwen3_next", gguf="qwen3next", branches=branches)
