"""Falcon-H1: attention and Mamba 2 side by side in every layer, with scales of many activations."""

from dataclasses import replace
from typing import Any

from lrc.model.families.base import ATTENTION, Branch, Family, side_by_side


def branches(config: Any, _layer: int) -> tuple[Branch, Branch]:
    """The branches of a layer. Other scales are inside the blocks."""
    attention = replace(
        ATTENTION,
        input_scale=config.attention_in_multiplier,
        output_scale=config.attention_out_multiplier,
    )
    mamba = Branch(
        "mamba",
        {"in_proj": "mamba.in_proj"},
        {"out_proj": "mamba.out_proj"},
        ATTENTION.norm,
        output_scale=config.ssm_out_multiplier,
    )
    ffn = Branch(
        "feed_forward",
        {name: f"feed_forward.{name}_proj" for name in ("gate", "up")},
        {"down": "feed_forward.down_proj"},
        "pre_ff_layernorm",
        writer_scale=config.mlp_multipliers[1],
    )
    return side_by_side(attention, mamba), ffn


def set_hidden_size(config: Any, size: int) -> None:
    """Keep the width of Mamba layers."""
    if config.mamba_d_ssm is None:
        config.mamba_d_ssm = int(config.mamba_expand * config.hidden_size)
    config.hidden_size = size


FALCON_H1 = Family(
    "falcon_h1",
    gguf="falcon-h1",
    branches=branches,
    final_norm="model.final_layernorm",
    embedding_scale=lambda config: config.embedding_multiplier,
    logit_scale=lambda config: config.lm_head_multiplier,
    set_hidden_size=set_hidden_size,
    keeps_documents_apart=False,
)
