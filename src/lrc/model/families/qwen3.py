"""Qwen3: Llama's layout with norms on q and k inside the attention.

Those norms are as wide as a head. head_dim does not change, so the student keeps the teacher's
gains.
"""

from lrc.model.families.base import Family

QWEN3 = Family("qwen3", gguf="qwen3", vllm=True)
