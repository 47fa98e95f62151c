"""Mixtral: Llama's attention, and experts in every layer."""

from lrc.model.families.base import ATTENTION, EXPERTS, Family, always

MIXTRAL = Family("mixtral", gguf="llama", branches=always(ATTENTION, EXPERTS))
