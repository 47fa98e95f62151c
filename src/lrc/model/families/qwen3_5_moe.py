"""Qwen3.5, text, with experts: Qwen3.5's mixers, and experts with a weighted shared one."""

from dataclasses import replace

from lrc.model.families.base import EXPERTS, with_shared
from lrc.model.families.qwen3_5 import QWEN3_5, mixer

SHARED = with_shared(EXPERTS, "mlp.shared_expert", router="mlp.shared_expert_gate")

QWEN3_5_MOE = replace(
    QWEN3_5,
    model_type="qwen3_5_moe_text",
    gguf="qwen35moe",
    branches=lambda config, layer: (mixer(config, layer), SHARED),
)
