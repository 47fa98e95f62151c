"""Mistral: Llama's layout with sliding-window attention."""

from lrc.families.base import Family

MISTRAL = Family("mistral")
