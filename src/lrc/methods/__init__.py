"""One file a method, all behind the interface in `base.py`."""

from lrc.methods.base import Counts, Method
from lrc.methods.low_rank_clone import LowRankClone
from lrc.methods.scratch import Scratch

METHODS: dict[str, type[Method]] = {
    "lrc": LowRankClone,
    "scratch": Scratch,
}
"""Every method by its name in a recipe."""

__all__ = ["METHODS", "Counts", "LowRankClone", "Method"]
