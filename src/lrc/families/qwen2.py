"""Qwen2 and Qwen2.5: Llama's layout with biases on q, k and v, which stay the teacher's."""

from lrc.families.base import Family

QWEN2 = Family("qwen2")
