"""Granite 3 with experts: Granite's attention, and experts in every layer."""

from dataclasses import replace

from lrc.model.families.base import ATTENTION, ROUTER, Branch, Experts, always
from lrc.model.families.granite import GRANITE

BLOCK = "block_sparse_moe"
EXPERTS = Branch(
    BLOCK,
    {ROUTER: f"{BLOCK}.router", "gate_up": Experts(f"{BLOCK}.experts.gate_up_proj", axis=-1)},
    {"down": Experts(f"{BLOCK}.experts.down_proj", axis=-2)},
    "post_attention_layernorm",
)

GRANITEMOE = replace(
    GRANITE, model_type="granitemoe", gguf="granitemoe", branches=always(ATTENTION, EXPERTS)
)
