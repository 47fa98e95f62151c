"""EXAONE 3 and 3.5: Llama's class; transformers renames the stored weights."""

from lrc.model.families.base import Family

EXAONE = Family("exaone", divides_by_heads=True, gguf="llama")
