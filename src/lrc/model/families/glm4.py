"""GLM 4, dense: norms before and after each block, and an FFN with gate and up in one matrix."""

from dataclasses import replace

from lrc.model.families.base import ATTENTION, Branch, Family, always

GLM4 = Family(
    "glm4",
    gguf="glm4",
    branches=always(
        replace(ATTENTION, after="post_self_attn_layernorm"),
        Branch(
            "mlp",
            {"gate_up": "mlp.gate_up_proj"},
            {"down": "mlp.down_proj"},
            "post_attention_layernorm",
            after="post_mlp_layernorm",
        ),
    ),
)
