"""Qwen2 and Qwen2.5: Llama's layout with biases on q, k and v, which stay the teacher's.

llama.cpp's own `qwen2` assumes that the hidden size is heads * head_dim, which is false for a
student. Its `llama` has explicit head widths and optional biases, and computes the same.
"""

from lrc.model.families.base import Family

QWEN2 = Family("qwen2", gguf="llama", vllm=False)
