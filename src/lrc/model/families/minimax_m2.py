"""MiniMax M2: attention with norms over all heads of q and k, and experts in every layer."""

from lrc.model.families.base import ATTENTION, EXPERTS, Family, always

MINIMAX_M2 = Family("minimax_m2", gguf="minimax-m2", branches=always(ATTENTION, EXPERTS))
