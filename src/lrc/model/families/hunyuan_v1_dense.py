"""Hunyuan, dense: Llama's layout with norms on q and k inside the attention."""

from lrc.model.families.base import Family

HUNYUAN_V1_DENSE = Family("hunyuan_v1_dense", gguf="hunyuan-dense")
