"""Qwen3 with experts: Qwen3's attention; in most layers the FFN is a mixture of experts."""

from typing import Any

from lrc.model.families.base import ATTENTION, EXPERTS, FFN, Branch, Family


def branches(config: Any, layer: int) -> tuple[Branch, ...]:
    """The branches of a layer."""
    dense = layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step
    return ATTENTION, FFN if dense else EXPERTS


QWEN3_MOE = Family("qwen3_moe", branches=branches)
