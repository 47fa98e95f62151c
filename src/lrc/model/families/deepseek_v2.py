"""DeepSeek V2: DeepSeek V3's layers with another router."""

from dataclasses import replace

from lrc.model.families.deepseek_v3 import DEEPSEEK_V3

DEEPSEEK_V2 = replace(DEEPSEEK_V3, model_type="deepseek_v2", divides_by_heads=True)
