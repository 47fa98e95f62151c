"""K-EXAONE: attention with norms on q and k inside it, and experts with a shared one in most
layers."""

from lrc.model.families.base import ATTENTION, Family
from lrc.model.families.glm4_moe_lite import FFNS

EXAONE_MOE = Family(
    "exaone_moe",
    gguf="exaone-moe",
    branches=lambda config, layer: (ATTENTION, FFNS[config.mlp_layer_types[layer]]),
)
