"""GLM 4.5 and later: Llama's attention, a few dense layers, then experts with a shared one."""

from lrc.model.families.base import ATTENTION, Family
from lrc.model.families.deepseek_v3 import ffn

GLM4_MOE = Family(
    "glm4_moe", gguf="glm4moe", branches=lambda config, layer: (ATTENTION, ffn(config, layer))
)
