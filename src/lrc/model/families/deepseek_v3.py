"""DeepSeek V3: multi-head latent attention, a few dense layers, then experts with a shared one."""

from typing import Any

from lrc.model.families.base import EXPERTS, FFN, Branch, Family, latent_attention, with_shared

SHARED = with_shared(EXPERTS, "mlp.shared_experts")


def branches(config: Any, layer: int) -> tuple[Branch, ...]:
    """The branches of a layer."""
    dense = layer < config.first_k_dense_replace
    return latent_attention(config), FFN if dense else SHARED


DEEPSEEK_V3 = Family("deepseek_v3", branches=branches)
