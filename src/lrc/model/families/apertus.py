"""Apertus: an FFN without a gate, norms of other names, and norms on q and k."""

from dataclasses import replace

from lrc.model.families.base import ATTENTION, FFN, Family, always

APERTUS = Family(
    "apertus",
    gguf="apertus",
    branches=always(
        replace(ATTENTION, norm="attention_layernorm"),
        replace(FFN, readers={"up": "mlp.up_proj"}, norm="feedforward_layernorm"),
    ),
)
