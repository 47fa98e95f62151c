"""GLM 4 of 2024 (`glm-4-9b-hf`) and GLM Edge: Llama's attention, and gate and up in one matrix."""

from lrc.model.families.base import ATTENTION, Family, always
from lrc.model.families.phi3 import FFN

GLM = Family("glm", branches=always(ATTENTION, FFN))
