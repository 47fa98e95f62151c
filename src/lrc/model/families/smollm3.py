"""SmolLM3: Llama's layout, with some layers without rotary embedding."""

from lrc.model.families.base import Family

SMOLLM3 = Family("smollm3", gguf="smollm3")
