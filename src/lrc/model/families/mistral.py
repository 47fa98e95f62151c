"""Mistral: Llama's layout with sliding-window attention."""

from lrc.model.families.base import Family

MISTRAL = Family("mistral", gguf="llama", vllm=True)
