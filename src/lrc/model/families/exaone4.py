"""EXAONE 4: OLMo 2's layout, with sliding-window attention in some layers."""

from dataclasses import replace

from lrc.model.families.olmo2 import OLMO2

EXAONE4 = replace(OLMO2, model_type="exaone4", vllm=None)
