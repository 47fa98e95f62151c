"""Arcee: Llama's attention, and an FFN without a gate."""

from dataclasses import replace

from lrc.model.families.base import ATTENTION, FFN, Family, always

ARCEE = Family(
    "arcee",
    gguf="arcee",
    branches=always(ATTENTION, replace(FFN, readers={"up": "mlp.up_proj"})),
    divides_by_heads=True,
)
