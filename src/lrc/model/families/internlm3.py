"""InternLM3: Llama's class, whose biases are all or none."""

from lrc.model.families.base import Family

INTERNLM3 = Family("internlm3", divides_by_heads=True, gguf="llama")
