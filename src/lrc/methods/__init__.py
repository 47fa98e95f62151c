"""One file a method, all behind the interface in `base.py`."""

from lrc.methods.base import Counts, Method
from lrc.methods.low_rank_clone import LowRankClone

__all__ = ["Counts", "LowRankClone", "Method"]
