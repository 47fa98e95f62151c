"""Phi-3 and Phi-4: q, k and v in one matrix, gate and up in another."""

from dataclasses import replace
from typing import Any

from lrc.model.families import base
from lrc.model.families.base import ATTENTION, Family, always

FFN = replace(base.FFN, readers={"gate_up": "mlp.gate_up_proj"})


def unsupported(config: Any) -> str | None:
    """Scaled rotary frequencies, whose number the configuration checks against the hidden size."""
    rope = getattr(config, "rope_parameters", None) or {}
    return "longrope frequencies" if rope.get("rope_type") == "longrope" else None


PHI3 = Family(
    "phi3",
    gguf="llama",
    unsupported=unsupported,
    branches=always(replace(ATTENTION, readers={"qkv": "self_attn.qkv_proj"}), FFN),
)
