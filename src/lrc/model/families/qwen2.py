"""Qwen2 and Qwen2.5: Llama's layout with biases on q, k and v, which stay the teacher's.

llama.cpp's own `qwen2` takes heads * head_dim for the hidden size, which a student breaks; its
`llama` has explicit head widths and optional biases, and computes the same.
"""

from lrc.model.families.base import Family

QWEN2 = Family("qwen2", gguf="llama", gguf_neighbors=True)
