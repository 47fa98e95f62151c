"""Gemma 2: Gemma with a norm after each block, too, and a softcap of the logits."""

from dataclasses import replace
from typing import Any

from lrc.model.families.base import ATTENTION, FFN, always
from lrc.model.families.gemma import GEMMA

BETWEEN_NORMS = (
    replace(ATTENTION, after="post_attention_layernorm"),
    replace(FFN, norm="pre_feedforward_layernorm", after="post_feedforward_layernorm"),
)


def unsupported(config: Any) -> str | None:
    """What models that embed whole texts, such as EmbeddingGemma, have."""
    return "bidirectional attention" if config.use_bidirectional_attention is True else None


GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    gguf="gemma2",
    branches=always(*BETWEEN_NORMS),
    divides_by_heads=True,
    unsupported=unsupported,
)
