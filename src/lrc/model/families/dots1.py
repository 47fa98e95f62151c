"""dots.llm1: GLM 4.5's layers, with norms on q and k inside the attention."""

from dataclasses import replace

from lrc.model.families.glm4_moe import GLM4_MOE

DOTS1 = replace(GLM4_MOE, model_type="dots1", gguf="dots1")
