"""Granite: Llama's layout with scales of the embedding, the branches and the logits."""

from lrc.model.families.base import Family

GRANITE = Family(
    "granite",
    gguf="granite",
    embedding_scale=lambda config: config.embedding_multiplier,
    residual_scale=lambda config: config.residual_multiplier,
    logit_scale=lambda config: 1 / config.logits_scaling,
)
