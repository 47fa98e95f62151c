"""Qwen3 with experts: Qwen3's attention; in most layers the FFN is a mixture of experts."""

from typing import Any

from lrc.model.families.base import ATTENTION, EXPERTS, FFN, Family


def is_dense(config: Any, layer: int) -> bool:
    """Whether a layer has an FFN in place of experts."""
    return layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step != 0


QWEN3_MOE = Family(
    "qwen3_moe",
    gguf="qwen3moe",
    branches=lambda config, layer: (ATTENTION, FFN if is_dense(config, layer) else EXPERTS),
)
