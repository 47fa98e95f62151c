"""Qwen3.5, text, dense: in most layers a gated delta net instead of attention. The output of the
attention is gated by a second half of q."""

from typing import Any

from lrc.model.families.base import ATTENTION, FFN, Branch, Family, is_linear

DELTA_NET = Branch(
    "linear_attn",
    {name: f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a")},
    {"o": "linear_attn.out_proj"},
    ATTENTION.norm,
)


def mixer(config: Any, layer: int) -> Branch:
    """The attention or delta net of a layer."""
    return DELTA_NET if is_linear(config, layer) else ATTENTION


QWEN3_5 = Family(
    "qwen3_5_text",
    gguf="qwen35",
    branches=lambda config, layer: (mixer(config, layer), FFN),
    gain_offset=1.0,
    keeps_documents_apart=False,
)
