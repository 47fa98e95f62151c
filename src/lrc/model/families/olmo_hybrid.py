"""OLMo Hybrid: layers of OLMo 2's attention, and layers of a gated delta net with norms before the
blocks."""

from typing import Any

from lrc.model.families.base import ATTENTION, FFN, Branch, Family
from lrc.model.families.olmo2 import NORMS_AFTER

LINEAR = "linear_attn"
DELTA_NET = Branch(
    LINEAR,
    {
        **{name: f"{LINEAR}.{name}_proj" for name in ("q", "k", "v", "a", "b")},
        "z": f"{LINEAR}.g_proj",
    },
    {"o": f"{LINEAR}.o_proj"},
    ATTENTION.norm,
)


def branches(config: Any, layer: int) -> tuple[Branch, ...]:
    """The branches of a layer."""
    linear = config.layer_types[layer] == "linear_attention"
    return (DELTA_NET, FFN) if linear else NORMS_AFTER


OLMO_HYBRID = Family("olmo_hybrid", branches=branches, keeps_documents_apart=False)
