"""Granite 4: Mamba 2 or attention, and an FFN with names of its own, with experts beside it in some
models."""

from dataclasses import replace
from typing import Any

from lrc.model.families.base import ATTENTION, LINEAR, Branch, Family, is_linear, side_by_side
from lrc.model.families.granite import GRANITE
from lrc.model.families.granitemoe import EXPERTS

MAMBA = Branch("mamba", {"in_proj": "mamba.in_proj"}, {"o": "mamba.out_proj"}, ATTENTION.norm)
FFN = Branch(
    "shared_mlp",
    {"gate_up": "shared_mlp.input_linear"},
    {"down": "shared_mlp.output_linear"},
    "post_attention_layernorm",
)
SHARED = side_by_side(
    EXPERTS,
    replace(
        FFN,
        readers={"shared_gate_up": FFN.readers["gate_up"]},
        writers={"shared_down": FFN.writers["down"]},
    ),
)


def branches(config: Any, layer: int) -> tuple[Branch, Branch]:
    """The branches of a layer."""
    mixer = MAMBA if is_linear(config, layer) else ATTENTION
    return mixer, SHARED if config.num_local_experts else FFN


def hidden_sizes(config: Any) -> list[int] | None:
    """The even divisors of the width of its Mamba layers, which the configuration has in whole
    units of the hidden size; None: there are no Mamba layers."""
    if LINEAR not in config.layer_types:
        return None
    width = config.mamba_expand * config.hidden_size
    return [size for size in range(2, config.hidden_size + 1, 2) if width % size == 0]


def set_hidden_size(config: Any, size: int) -> None:
    """Keep the width of Mamba layers. The configuration checks it even if there are none."""
    width = config.mamba_expand * config.hidden_size
    config.hidden_size = size
    if LINEAR in config.layer_types:
        config.mamba_expand = width // size
    else:
        config.mamba_n_heads, config.mamba_d_head = 1, config.mamba_expand * size


GRANITEMOEHYBRID: Family = replace(
    GRANITE,
    model_type="granitemoehybrid",
    gguf="granitehybrid",
    branches=branches,
    neurons="shared_intermediate_size",
    hidden_sizes=hidden_sizes,
    set_hidden_size=set_hidden_size,
    keeps_documents_apart=False,
)
