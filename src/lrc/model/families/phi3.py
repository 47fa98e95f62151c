"""Phi-3 and Phi-4: q, k and v in one matrix, gate and up in another."""

from dataclasses import replace

from lrc.model.families.base import ATTENTION, FFN, Family, always

PHI3 = Family(
    "phi3",
    branches=always(
        replace(ATTENTION, readers={"qkv": "self_attn.qkv_proj"}),
        replace(FFN, readers={"gate_up": "mlp.gate_up_proj"}),
    ),
)
