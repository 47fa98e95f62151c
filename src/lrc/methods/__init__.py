"""One file a method, all behind the interface in `base.py`."""

from lrc.methods.base import TOKEN_LM, Counts, Method
from lrc.methods.low_rank_clone import LowRankClone

__all__ = ["TOKEN_LM", "Counts", "LowRankClone", "Method"]
