"""Qwen3-Next: as Qwen3.5 with experts, with other matrices in the delta net."""

from dataclasses import replace
from typing import Any

from lrc.model.families.base import ATTENTION, FFN, Branch
from lrc.model.families.qwen3_5 import DELTA_NET
from lrc.model.families.qwen3_5_moe import QWEN3_5_MOE, SHARED

FUSED_DELTA_NET = replace(
    DELTA_NET,
    readers={name: f"linear_attn.in_proj_{name}" for name in ("qkvz", "ba")},
)


def branches(config: Any, layer: int) -> tuple[Branch, ...]:
    """The branches of a layer."""
    linear = config.layer_types[layer] == "linear_attention"
    dense = layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step
    return FUSED_DELTA_NET if linear else ATTENTION, FFN if dense else SHARED


QWEN3_NEXT = replace(QWEN3_5_MOE, model_type="qwen3_next", branches=branches)
