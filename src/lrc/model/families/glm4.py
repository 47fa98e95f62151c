"""GLM 4, dense: norms before and after each block, and an FFN with gate and up in one matrix."""

from dataclasses import replace

from lrc.model.families.base import ATTENTION, Family, always
from lrc.model.families.phi3 import FFN

GLM4 = Family(
    "glm4",
    gguf="glm4",
    branches=always(
        replace(ATTENTION, after="post_self_attn_layernorm"),
        replace(FFN, after="post_mlp_layernorm"),
    ),
)
