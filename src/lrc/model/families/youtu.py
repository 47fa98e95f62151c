"""Youtu: multi-head latent attention and Llama's FFN."""

from lrc.model.families.base import FFN, Family, latent_attention

YOUTU = Family(
    "youtu", gguf="deepseek2", branches=lambda config, _layer: (latent_attention(config), FFN)
)
