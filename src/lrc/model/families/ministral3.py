"""Ministral 3: Llama's layout, with a scale of the queries that grows with the position."""

from lrc.model.families.base import Family

MINISTRAL3 = Family("ministral3", gguf="mistral3")
