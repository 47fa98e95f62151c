"""OLMo Hybrid: layers of OLMo 2's attention, and layers of a gated delta net with norms before the
blocks."""

from typing import Any

from lrc.model.families.base import ATTENTION, FFN, Branch, Family, is_linear
from lrc.model.families.olmo2 import NORMS_AFTER

BLOCK = "linear_attn"
DELTA_NET = Branch(
    BLOCK,
    {
        **{name: f"{BLOCK}.{name}_proj" for name in ("q", "k", "v", "a", "b")},
        "z": f"{BLOCK}.g_proj",
    },
    {"o": f"{BLOCK}.o_proj"},
    ATTENTION.norm,
)


def branches(config: Any, layer: int) -> tuple[Branch, ...]:
    """The branches of a layer."""
    return (DELTA_NET, FFN) if is_linear(config, layer) else NORMS_AFTER


OLMO_HYBRID = Family("olmo_hybrid", branches=branches, keeps_documents_apart=False)
