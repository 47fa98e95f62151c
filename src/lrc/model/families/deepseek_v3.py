"""DeepSeek V3: multi-head latent attention, a few dense layers, then experts with a shared one."""

from typing import Any

from lrc.model.families.base import EXPERTS, FFN, Branch, Family, latent_attention, with_shared

SHARED = with_shared(EXPERTS, "mlp.shared_experts")


def ffn(config: Any, layer: int) -> Branch:
    """The FFN or the experts of a layer."""
    return FFN if layer < config.first_k_dense_replace else SHARED


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    gguf="deepseek2",
    branches=lambda config, layer: (latent_attention(config), ffn(config, layer)),
)
