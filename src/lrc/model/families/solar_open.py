"""Solar Open: Llama's attention, and experts with a shared one in every layer."""

from lrc.model.families.base import ATTENTION, Family, always
from lrc.model.families.deepseek_v3 import SHARED

SOLAR_OPEN = Family("solar_open", gguf="glm4moe", neurons=None, branches=always(ATTENTION, SHARED))
