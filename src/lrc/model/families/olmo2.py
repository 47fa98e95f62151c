"""OLMo 2: blocks read the stream itself, and a norm follows each of them."""

from dataclasses import replace

from lrc.model.families.base import ATTENTION, FFN, Family, always

NORMS_AFTER = (
    replace(ATTENTION, norm=None, after="post_attention_layernorm"),
    replace(FFN, norm=None, after="post_feedforward_layernorm"),
)

OLMO2 = Family("olmo2", branches=always(*NORMS_AFTER), vllm=False)
