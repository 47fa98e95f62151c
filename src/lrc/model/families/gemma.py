"""Gemma 1: Llama's layout. The embedding is scaled by the root of the model's own hidden size, and
the norms' weights are stored around zero."""

from typing import Any

from lrc.model.families.base import Family


def root_of_width(config: Any) -> float:
    """Gemma's scale of the embedding."""
    return float(config.hidden_size**0.5)


GEMMA = Family(
    "gemma", gguf="gemma", gain_offset=1.0, embedding_scale=root_of_width, needs_bos=True
)
