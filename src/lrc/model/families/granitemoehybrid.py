"""Granite 4 without experts: Mamba 2 or attention, and an FFN with names of its own."""

from dataclasses import replace
from typing import Any

from lrc.model.families.base import ATTENTION, LINEAR, Branch, Family, is_linear
from lrc.model.families.granite import GRANITE

MAMBA = Branch("mamba", {"in_proj": "mamba.in_proj"}, {"o": "mamba.out_proj"}, ATTENTION.norm)
FFN = Branch(
    "shared_mlp",
    {"gate_up": "shared_mlp.input_linear"},
    {"down": "shared_mlp.output_linear"},
    "post_attention_layernorm",
)


def branches(config: Any, layer: int) -> tuple[Branch, Branch]:
    """The branches of a layer."""
    return MAMBA if is_linear(config, layer) else ATTENTION, FFN


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
    gguf=None,
    branches=branches,
    neurons="shared_intermediate_size",
    hidden_sizes=hidden_sizes,
    set_hidden_size=set_hidden_size,
    unsupported=lambda config: (
        "experts beside an FFN of another module" if config.num_local_experts else None
    ),
    keeps_documents_apart=False,
)
