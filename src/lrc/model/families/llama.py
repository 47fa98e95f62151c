"""Llama 2 and 3, SmolLM2, TinyLlama and others of the same class."""

from lrc.model.families.base import Family

LLAMA = Family("llama", divides_by_heads=True, gguf="llama", vllm=True)
