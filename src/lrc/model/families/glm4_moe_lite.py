"""GLM 4.7 Flash: DeepSeek V3's latent attention and experts, and the kind of each layer's FFN in a
list."""

from lrc.model.families.base import FFN, Family, latent_attention
from lrc.model.families.deepseek_v3 import SHARED

FFNS = {"dense": FFN, "sparse": SHARED}

GLM4_MOE_LITE = Family(
    "glm4_moe_lite",
    gguf="deepseek2",
    branches=lambda config, layer: (latent_attention(config), FFNS[config.mlp_layer_types[layer]]),
)
