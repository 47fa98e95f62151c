"""Trinity: norms before and after each block, a gate of the attention's output, and experts with a
shared one in most layers."""

from dataclasses import replace
from typing import Any

from lrc.model.families.base import (
    ATTENTION,
    EXPERTS,
    FFN,
    ROUTER,
    Branch,
    Family,
    with_shared,
)
from lrc.model.families.gemma import root_of_width

GATED = replace(
    ATTENTION,
    readers={**ATTENTION.readers, "z": "self_attn.gate_proj"},
    after="post_attention_layernorm",
)
SPARSE = with_shared(
    replace(EXPERTS, readers={**EXPERTS.readers, ROUTER: "mlp.router.gate"}), "mlp.shared_experts"
)


def branches(config: Any, layer: int) -> tuple[Branch, Branch]:
    """The branches of a layer."""
    ffn = FFN if layer < config.num_dense_layers else SPARSE
    return GATED, replace(ffn, norm="pre_mlp_layernorm", after="post_mlp_layernorm")


AFMOE = Family(
    "afmoe",
    gguf="afmoe",
    branches=branches,
    embedding_scale=lambda config: root_of_width(config) if config.mup_enabled else 1.0,
    keeps_documents_apart=False,  # its masks ignore position ids
)
