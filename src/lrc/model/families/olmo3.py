"""OLMo 3: OLMo 2's layout, with sliding-window attention in some layers."""

from dataclasses import replace

from lrc.model.families.olmo2 import OLMO2

OLMO3 = replace(OLMO2, model_type="olmo3", vllm=None)
