"""ERNIE 4.5, dense: Llama's layout. Neighboring rows of q and k are rotated together."""

from lrc.model.families.base import Family

ERNIE4_5 = Family("ernie4_5", gguf="ernie4_5")
