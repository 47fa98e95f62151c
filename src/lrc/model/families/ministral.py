"""Ministral: Llama's layout, with sliding-window attention in some layers."""

from lrc.model.families.base import Family

MINISTRAL = Family("ministral", gguf="llama")
