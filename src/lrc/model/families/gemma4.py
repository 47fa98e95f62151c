"""Gemma 4, text, dense: Gemma 2's layout. The widths of heads differ between layers, some layers
use their keys as values, and every layer ends with a scale.

The variants that add embeddings to every layer (E2B, E4B), and that with experts, are refused.
"""

from dataclasses import replace
from typing import Any

from lrc.model.families.base import Branch, Family
from lrc.model.families.gemma import root_of_width
from lrc.model.families.gemma2 import BETWEEN_NORMS


def branches(config: Any, layer: int) -> tuple[Branch, ...]:
    """Gemma 2's, without v where the keys are the values."""
    attention, ffn = BETWEEN_NORMS
    if config.attention_k_eq_v and config.layer_types[layer] == "full_attention":
        attention = replace(attention, readers={n: attention.readers[n] for n in ("q", "k")})
    return attention, ffn


REFUSED = {
    "hidden_size_per_layer_input": "embeddings for every layer",
    "enable_moe_block": "experts beside its FFN",
    "num_kv_shared_layers": "layers that share keys and values",
}
"""What the smaller variants and the one with experts add, by the setting that says so."""


def unsupported(config: Any) -> str | None:
    """What the variants that are refused have."""
    if config.use_bidirectional_attention == "all":
        return "bidirectional attention"
    return next((REFUSED[name] for name in REFUSED if getattr(config, name, 0)), None)


GEMMA4 = Family(
    "gemma4_text",
    gguf="gemma4",
    unsupported=unsupported,
    branches=branches,
    embedding_scale=root_of_width,
    layer_scale="layer_scalar",
    needs_bos=True,
)

GEMMA4_UNIFIED = replace(GEMMA4, model_type="gemma4_unified_text")
