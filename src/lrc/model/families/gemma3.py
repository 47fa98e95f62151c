"""Gemma 3, text: Gemma 2's layout with norms on q and k inside the attention."""

from dataclasses import replace

from lrc.model.families.gemma2 import GEMMA2

GEMMA3 = replace(GEMMA2, model_type="gemma3_text", gguf="gemma3")
