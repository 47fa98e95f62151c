"""Code World Model: Llama's layout, with sliding-window attention in most layers."""

from lrc.model.families.base import Family

CWM = Family("cwm", gguf="llama", divides_by_heads=True)
