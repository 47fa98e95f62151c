"""Mixtral: Llama's attention, and experts in every layer."""

from lrc.model.families.base import ATTENTION, EXPERTS, Family, always

MIXTRAL = Family("mixtral", branches=always(ATTENTION, EXPERTS))
