"""Hunyuan 3: K-EXAONE's layers with another router."""

from dataclasses import replace

from lrc.model.families.exaone_moe import EXAONE_MOE

HY_V3 = replace(EXAONE_MOE, model_type="hy_v3", gguf=None)
